"""Ragged batches that reach every path of the CUDA kernels, and a float64 reference.

Used twice: by ``test_cuda_build.py`` with the kernels emulated on the CPU, and by ``tests/gpu/test_cuda_kernels.py``
with the real ones. Everything that must not be read is NaN.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from tests.kernels import cases
from vllm_nld.ops import BlockAttention

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
NAN = float("nan")


@dataclass(frozen=True)
class Batch:
    """Description of a batch.

    Attributes:
        rows: (prefix, length, mask kind) of each row.
        group: query heads per KV head.
        pages: how the cache lies in memory: "plain", "fused" (keys and values in one row, so still aligned), "shifted"
            (not aligned to 16 bytes), "transposed" (the inner stride is not 1).
        by_head: a float8 cache has a scale for each KV head.
        shifted: query, key, value and output are also not aligned.
        split_limit: as in ``cuda_ops.block_attention``.
    """

    rows: tuple[tuple[int, int, int], ...]
    dtype: torch.dtype = torch.bfloat16
    cache: torch.dtype | None = None
    group: int = 4
    kv_heads: int = 2
    head_size: int = 64
    page_size: int = 16
    pages: str = "plain"
    shifted: bool = False
    by_head: bool = False
    split_limit: int = 0
    slack: int = 0
    seed: int = 0


MIXED = ((150, 9, 0), (0, 12, 1), (37, 0, 0), (64, 17, 1), (1, 1, 1))
LONG = ((700, 3, 1), (0, 2, 0), (290, 5, 0))
BATCHES = {
    "bfloat16": Batch(MIXED),
    "float16": Batch(MIXED, torch.float16),
    "float32": Batch(MIXED, torch.float32),
    **{
        f"head {size} {str(dtype)[6:]}": Batch(((70, 7, 1), (0, 4, 0)), dtype, head_size=size, group=2)
        for size in (32, 48, 80, 96, 112, 128, 144, 192, 208, 256)
        for dtype in (torch.bfloat16, torch.float32)
    },
    "several query tiles": Batch(((40, 70, 1), (3, 40, 0)), kv_heads=1, head_size=32, slack=20),
    "group of 1": Batch(MIXED, group=1),
    "group of 3": Batch(MIXED, torch.float16, group=3, slack=1),
    "group of 8, wide": Batch(((70, 9, 0), (0, 3, 1)), group=8, kv_heads=1, head_size=128),
    "odd pages": Batch(MIXED, page_size=7),
    "large pages": Batch(MIXED, page_size=128, group=2, slack=300),
    "fused pages": Batch(MIXED, pages="fused", head_size=96),
    "shifted pages": Batch(MIXED, pages="shifted"),
    "transposed pages": Batch(MIXED, torch.float16, pages="transposed"),
    "transposed pages float32": Batch(MIXED, torch.float32, pages="transposed"),
    "shifted tokens": Batch(MIXED, shifted=True),
    "shifted tokens float32": Batch(MIXED, torch.float32, shifted=True, head_size=80),
    **{
        f"{str(cache)[6:]} {pages} {str(dtype)[6:]}": Batch(
            MIXED if pages != "plain" else LONG, dtype, cache, pages=pages
        )
        for cache in FLOAT8
        for pages in ("plain", "shifted", "transposed")
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    },
    **{
        f"{str(cache)[6:]} by head {str(dtype)[6:]}": Batch(LONG, dtype, cache, group=2, kv_heads=3, by_head=True)
        for cache in FLOAT8
        for dtype in (torch.bfloat16, torch.float32)
    },
    **{
        f"{limit} splits {str(dtype)[6:]}": Batch(LONG, dtype, split_limit=limit, slack=900, head_size=128)
        for limit in (1, 2, 5, 64)
        for dtype in (torch.bfloat16, torch.float32)
    },
    "split, and no prefix": Batch(((600, 2, 0), (0, 3, 1)), seed=5),
}


def random_batch(seed: int) -> Batch:
    """Draw a batch."""
    draw = random.Random(seed)
    rows = tuple(
        (draw.choice((0, draw.randrange(1, 40), draw.randrange(1, 400))), draw.randrange(0, 40), draw.randrange(2))
        for _ in range(draw.randrange(1, 5))
    )
    return Batch(
        rows,
        draw.choice((torch.bfloat16, torch.float16, torch.float32)),
        draw.choice((None, None, *FLOAT8)),
        group=draw.randrange(1, 6),
        kv_heads=draw.randrange(1, 3),
        head_size=16 * draw.randrange(2, 9),
        page_size=draw.choice((1, 5, 16, 32)),
        pages=draw.choice(("plain", "fused", "shifted", "transposed")),
        shifted=draw.random() < 0.3,
        by_head=draw.random() < 0.5,
        split_limit=draw.choice((0, 0, 1, 3)),
        slack=draw.choice((0, 30, 700)),
        seed=seed,
    )


def check(module: ModuleType, batch: Batch, device: str) -> None:
    """Compare ``module.block_attention`` with the reference."""
    call, expected, keys = build(batch)
    used = expected.shape[0]
    call = cases.on_device(call, device)
    module.block_attention(call, split_limit=batch.split_limit)
    found = call.output.double().cpu()
    error = (found[:used] - expected).abs().max().item() if used else 0.0
    # Weights and the result are rounded to the dtype; float32 sums over many keys in another order.
    largest = expected.abs().max().item() if used else 0.0
    allowed = (2e-6 + 1e-8 * keys) * largest if batch.dtype == torch.float32 else torch.finfo(batch.dtype).eps * largest
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"  # NaN also fails


def build(batch: Batch) -> tuple[BlockAttention, Tensor, int]:
    """Return the arguments of block_attention, the float64 output of the used tokens, and the most keys of a query."""
    generator = torch.Generator().manual_seed(batch.seed)
    lengths, prefixes = [row[1] for row in batch.rows], [row[0] for row in batch.rows]
    used, size = sum(lengths), batch.head_size
    heads = batch.group * batch.kv_heads
    query, key, value, output = (
        _tokens(used + 3, count, batch, generator) for count in (heads, batch.kv_heads, batch.kv_heads, heads)
    )
    for x in (query, key, value):
        x[used:] = NAN
    output.fill_(NAN)
    table, count = _table(prefixes, batch.page_size, generator)
    cache = batch.cache or batch.dtype
    shape = (count, batch.kv_heads, batch.page_size, size)
    key_pages, value_pages = _pages(shape, cache, batch.pages)
    for row, prefix in enumerate(prefixes):
        for token in range(prefix):
            page, slot = int(table[row, token // batch.page_size]), token % batch.page_size
            for pages in (key_pages, value_pages):
                drawn = torch.randn(batch.kv_heads, size, generator=generator).to(cache)
                _raw(pages)[page, :, slot] = _raw(drawn)
    k_scale, v_scale = (0.75, 1.5) if batch.cache else (1.0, 1.0)
    by_head = batch.by_head and batch.cache is not None
    k_scales, v_scales = cases.scales_by_head(batch.kv_heads).unbind() if by_head else (None, None)
    call = BlockAttention(
        query=query,
        key=key,
        value=value,
        key_pages=key_pages,
        value_pages=value_pages,
        block_table=table,
        prefix_lens=torch.tensor(prefixes, dtype=torch.int32),
        block_starts=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        mask_kinds=torch.tensor([row[2] for row in batch.rows], dtype=torch.int32),
        scale=1.5 * size**-0.5,
        k_scale=NAN if by_head else k_scale,
        v_scale=NAN if by_head else v_scale,
        k_scales=k_scales,
        v_scales=v_scales,
        max_length=max(lengths) + batch.slack % 64,
        max_prefix=max(prefixes) + batch.slack,
        output=output,
    )
    return call, _reference(batch, call), max(map(sum, zip(prefixes, lengths, strict=True)))


def _reference(batch: Batch, call: BlockAttention) -> Tensor:
    query, key, value = (x.double() for x in (call.query, call.key, call.value))
    k_scales, v_scales = torch.tensor([[call.k_scale], [call.v_scale]]).expand(2, batch.kv_heads)
    if call.k_scales is not None and call.v_scales is not None:
        k_scales, v_scales = call.k_scales, call.v_scales
    key_pages = call.key_pages.float().double() * k_scales[:, None, None]
    value_pages = call.value_pages.float().double() * v_scales[:, None, None]
    result, start = [], 0
    for row, (prefix, length, kind) in enumerate(batch.rows):
        tokens = torch.arange(prefix)
        pages, slots = call.block_table[row, tokens // batch.page_size].long(), tokens % batch.page_size
        keys = torch.cat((key_pages[pages, :, slots], key[start : start + length]))
        values = torch.cat((value_pages[pages, :, slots], value[start : start + length]))
        for token in range(length):
            other = torch.arange(length)
            seen = torch.ones(length, dtype=torch.bool)
            if kind == 1:
                seen = other <= token
            mask = torch.cat((torch.ones(prefix, dtype=torch.bool), seen))
            grouped = query[start + token].view(batch.kv_heads, batch.group, -1)
            scores = torch.einsum("hgd,nhd->hgn", grouped, keys[mask]) * call.scale
            result.append(torch.einsum("hgn,nhd->hgd", scores.softmax(-1), values[mask]).flatten(0, 1))
        start += length
    return torch.stack(result) if result else query.new_zeros(0, *query.shape[1:])


def _tokens(count: int, heads: int, batch: Batch, generator: torch.Generator) -> Tensor:
    gap = 3 if batch.shifted else 0
    wide = torch.randn(count, heads * batch.head_size + gap, generator=generator).to(batch.dtype)
    return wide[:, gap:].unflatten(1, (heads, batch.head_size))


def _table(prefixes: list[int], page_size: int, generator: torch.Generator) -> tuple[Tensor, int]:
    counts = [-(-prefix // page_size) for prefix in prefixes]
    order = torch.randperm(sum(counts) + 1, generator=generator).to(torch.int32)
    table = torch.full((len(prefixes), max(1, *counts) + 2), 1 << 30, dtype=torch.int32)
    used = 0
    for row, count in enumerate(counts):
        table[row, :count] = order[used : used + count]
        used += count
    return table[:, :-1], sum(counts) + 1


def _pages(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor]:
    pages, heads, slots, size = shape
    if layout == "fused":
        both = torch.full((pages, slots, heads, 2 * size), NAN).to(dtype).transpose(1, 2)
        return both[..., :size], both[..., size:]
    if layout == "shifted":
        return tuple(torch.full((*shape[:3], size + 1), NAN).to(dtype)[..., 1:] for _ in range(2))  # type: ignore[return-value]
    if layout == "transposed":
        return tuple(torch.full((pages, heads, size, slots), NAN).to(dtype).transpose(2, 3) for _ in range(2))  # type: ignore[return-value]
    return tuple(torch.full(shape, NAN).to(dtype) for _ in range(2))  # type: ignore[return-value]


def _raw(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.element_size() == 1 else x


def check_accept(module: ModuleType, rows: int, seed: int, device: str) -> None:
    """Compare ``module.accept_prefix`` with a loop."""
    draw = random.Random(seed)
    lengths = [draw.randrange(0, 9) for _ in range(rows)]
    drafts = [[draw.choice((1, 2**40)) for _ in range(length)] for length in lengths]
    targets = [[t if draw.random() < 0.7 else 7 for t in row] + [draw.randrange(100)] for row in drafts]
    accepted = [
        next((i for i, (d, t) in enumerate(zip(row, target, strict=False)) if d != t), len(row))
        for row, target in zip(drafts, targets, strict=True)
    ]
    packed = [t for target, count in zip(targets, accepted, strict=True) for t in target[: count + 1]]
    found = module.accept_prefix(
        torch.tensor([t for row in drafts for t in row], dtype=torch.int64, device=device),
        torch.tensor([t for row in targets for t in row], dtype=torch.int64, device=device),
        torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device),
    )
    starts = torch.tensor([0, *(count + 1 for count in accepted)]).cumsum(0)
    expected = (
        accepted,
        packed + [-1] * (sum(lengths) + rows - len(packed)),
        starts.tolist(),
        [target[count] for target, count in zip(targets, accepted, strict=True)],
    )
    for x, y in zip(found, expected, strict=True):
        assert x.tolist() == y


def small(batch: Batch) -> Batch:
    """A batch of the same kind that is quick to emulate."""
    return replace(batch, kv_heads=1)
