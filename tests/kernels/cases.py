"""Random ragged cases of the operators (docs/developer/operators.md), and checks that every implementation must pass.

A spec is a small frozen record that hypothesis draws and prints; ``arguments(spec, ...)`` builds the tensors from it.
Everything that an implementation must not read (unused page slots, tokens after the last row) is NaN, as is the output.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from vllm_nld.ops import BlockAttention, torch_ops
from vllm_nld.ops.pages import LAYOUTS, STRIDED, TILED

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
NOWHERE = 1 << 30
"""Page id after the used part of a block table: reading the page would be far out of bounds."""

K_SCALE, V_SCALE = 0.5, 1.75
"""Scales of float8 caches, all different from 1 and from each other."""


def scales_by_head(kv_heads: int) -> Tensor:
    """Scales of each head, of keys and values: float32 ``[2, kv_heads]``, all different, not contiguous."""
    return (0.5 + torch.arange(2 * kv_heads) / (2 * kv_heads)).float().view(kv_heads, 2).T


def cache_shapes(pages: int, kv_heads: int, page_size: int, head_dim: int) -> tuple[tuple[int, ...], ...]:
    """Shape of the cache under each of ``vllm_nld.ops.pages.LAYOUTS``, in the same order."""
    fused = (pages, kv_heads, page_size, 2 * head_dim)
    by_token = (page_size, kv_heads, head_dim)
    return (
        fused,
        fused,
        fused,
        (2, pages, *by_token),
        (pages, 2, *by_token),
        (2, pages, kv_heads, page_size, head_dim),
        fused,
    )


def empty_cache(
    layout: int, pages: int, kv_heads: int, page_size: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Key and value views ``[pages, kv_heads, page_size, head_dim]``, or of tiles, of a cache full of NaN."""
    shape = cache_shapes(pages, kv_heads, page_size, head_dim)[layout]
    cache = torch.full(shape, torch.nan).to(dtype)
    return LAYOUTS[layout].split(cache, head_dim)


@dataclass(frozen=True)
class AttentionSpec:
    """One batch for block_attention.

    Attributes:
        prefixes: cached tokens of each row.
        lengths: fresh tokens of each row.
        kinds: mask kind of each row.
        heads: query heads per KV head, KV heads.
        head_dim: size of one head.
        page_size: tokens per page.
        layout: index into ``vllm_nld.ops.pages.LAYOUTS``.
        cache: dtype of the cache; None for the query's.
        shared: rows use the first row's whole pages for as much of their prefix as these cover.
        padding: fresh tokens after the last row.
        loose: the host-side bounds are larger than the batch, and the block table has unused columns.
        fused: query, key and value are views of one tensor.
        by_head: a float8 cache has a scale for each KV head.
        scale: multiplier of the scores, in units of ``head_dim ** -0.5``.
        seed: of the random numbers.
    """

    prefixes: tuple[int, ...]
    lengths: tuple[int, ...]
    kinds: tuple[int, ...]
    heads: tuple[int, int] = (1, 2)
    head_dim: int = 64
    page_size: int = 16
    layout: int = 3
    cache: torch.dtype | None = None
    shared: bool = False
    padding: int = 0
    loose: bool = False
    fused: bool = False
    by_head: bool = False
    scale: float = 1.0
    seed: int = 0


@st.composite
def attention_specs(
    draw: st.DrawFn,
    longest_prefix: int = 600,
    longest_block: int = 40,
    most_heads: int = 8,
    head_dims: Sequence[int] = (32, 64, 80, 96, 128, 256),
    caches: Sequence[torch.dtype | None] = (None, *FLOAT8),
    tiles: bool = False,
    by_head: bool = True,
) -> AttentionSpec:
    """Draw batches: short rows, at times one long one; empty prefixes, empty blocks, single tokens."""
    rows = draw(st.integers(1, 6))
    page_size = draw(st.sampled_from((16, 32, 128)))
    prefix = st.one_of(
        st.just(0),
        st.integers(1, 50),
        st.integers(1, 3).map(lambda pages: min(pages * page_size, longest_prefix)),
    )
    length = st.one_of(st.just(0), st.just(1), st.integers(2, 17))
    prefixes = draw(st.lists(prefix, min_size=rows, max_size=rows))
    lengths = draw(st.lists(length, min_size=rows, max_size=rows))
    if draw(st.booleans()):
        row = draw(st.integers(0, rows - 1))
        prefixes[row] = draw(st.integers(longest_prefix // 2, longest_prefix))
        lengths[row] = draw(st.integers(1, longest_block))
    ratios = [(g, h) for g, h in ((1, 3), (4, 2), (3, 2), (8, 1), (1, 1), (4, 1)) if g * h <= most_heads]
    return AttentionSpec(
        prefixes=tuple(prefixes),
        lengths=tuple(lengths),
        kinds=tuple(draw(st.lists(st.integers(0, 1), min_size=rows, max_size=rows))),
        heads=draw(st.sampled_from(ratios)),
        head_dim=draw(st.sampled_from(head_dims)),
        page_size=page_size,
        layout=draw(st.integers(0, len(LAYOUTS if tiles else STRIDED) - 1)),
        cache=draw(st.sampled_from(caches)),
        shared=draw(st.booleans()),
        padding=draw(st.sampled_from((0, 3))),
        loose=draw(st.booleans()),
        fused=draw(st.booleans()),
        by_head=by_head and draw(st.booleans()),
        scale=draw(st.sampled_from((1.0, 2.0))),
        seed=draw(st.integers(0, 2**16)),
    )


# What random drawing may miss in a short run; every implementation gets these as well.
EDGE_SPECS = {
    "long row next to short ones": AttentionSpec((1100, 3, 0, 16), (4, 1, 7, 0), (0, 1, 1, 0), heads=(4, 1), layout=0),
    "one long row": AttentionSpec((1500,), (1,), (1,), heads=(4, 2), padding=1),
    "both masks": AttentionSpec((20, 33, 5), (9, 40, 36), (0, 1, 0), padding=2),
    "no prefix": AttentionSpec((0, 0, 0), (35, 64, 1), (1, 0, 1), padding=2, seed=3),
    "causal beyond one tile": AttentionSpec((5,), (150,), (1,), heads=(3, 1), head_dim=32),
    "nothing fresh": AttentionSpec((5, 0), (0, 0), (0, 1), padding=4),
    "shared pages": AttentionSpec((64, 64, 40), (2, 3, 4), (0, 1, 0), page_size=32, shared=True, loose=True, layout=2),
    "whole pages": AttentionSpec((128, 256), (4, 5), (1, 0), page_size=128, heads=(8, 1), head_dim=128, fused=True),
    "padded head": AttentionSpec((30, 17), (4, 5), (1, 0), heads=(3, 2), head_dim=80, layout=0, padding=1),
    "float8 e4m3": AttentionSpec((70, 3), (4, 5), (0, 1), cache=torch.float8_e4m3fn, layout=4, loose=True),
    "float8 e5m2": AttentionSpec((700, 3), (4, 5), (0, 1), cache=torch.float8_e5m2, layout=1, page_size=32),
    "wide head": AttentionSpec((40, 9), (8, 3), (0, 1), heads=(4, 1), head_dim=256, layout=5),
}

HEAD_SCALE_SPECS = {
    "e4m3 by head": AttentionSpec((70, 3), (4, 5), (0, 1), (3, 2), cache=torch.float8_e4m3fn, layout=2, by_head=True),
    "e5m2 by head": AttentionSpec((700, 0), (4, 5), (0, 1), (2, 3), cache=torch.float8_e5m2, by_head=True),
}

# Pages in tiles of 16 by 2: whole tiles, begun ones, odd tokens, several pages, a page that ends inside 64 keys.
TILES = LAYOUTS.index(TILED)
TILED_SPECS = {
    "tiles": AttentionSpec((128, 70, 17, 0), (4, 3, 5, 2), (0, 1, 1, 0), heads=(4, 2), layout=TILES, page_size=32),
    "long tiles": AttentionSpec((901, 64), (16, 1), (1, 0), heads=(3, 1), head_dim=128, layout=TILES, page_size=128),
    "shared tiles": AttentionSpec((96, 97), (2, 3), (0, 1), head_dim=80, layout=TILES, page_size=48, shared=True),
    "float8 tiles": AttentionSpec((70, 3), (4, 5), (0, 1), cache=torch.float8_e4m3fn, layout=TILES, page_size=32),
}


def _block_table(spec: AttentionSpec, generator: torch.Generator) -> tuple[Tensor, int]:
    """Permuted page ids ``[R, M]``, unused entries ``NOWHERE``, and how many pages the cache has."""
    counts = [-(-n // spec.page_size) for n in spec.prefixes]
    pages = sum(counts) + 2
    order = torch.randperm(pages, generator=generator).to(torch.int32)
    columns = max(1, *counts) + 3 * spec.loose
    table = torch.full((len(counts), columns + spec.loose), NOWHERE, dtype=torch.int32)
    used = 0
    for row, count in enumerate(counts):
        table[row, :count] = order[used : used + count]
        used += count
        if spec.shared:
            whole = min(spec.prefixes[row], spec.prefixes[0]) // spec.page_size
            table[row, :whole] = table[0, :whole]
    return table[:, :columns], pages  # if loose, a view: rows are farther apart than they are long


def _fresh(spec: AttentionSpec, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, with NaN after the last row."""
    group, kv_heads = spec.heads
    tokens, dim = sum(spec.lengths) + spec.padding, spec.head_dim
    widths = [group * kv_heads, kv_heads, kv_heads]
    joined = torch.randn(tokens, sum(widths), dim, generator=generator).to(dtype)
    joined[sum(spec.lengths) :] = torch.nan
    query, key, value = joined.split(widths, 1)
    return (query, key, value) if spec.fused else (query.contiguous(), key.contiguous(), value.contiguous())


def attention_arguments(spec: AttentionSpec, dtype: torch.dtype, device: str = "cpu") -> BlockAttention:
    """Build the arguments of block_attention for ``dtype`` on ``device``."""
    generator = torch.Generator().manual_seed(spec.seed)
    query, key, value = _fresh(spec, dtype, generator)
    table, pages = _block_table(spec, generator)
    cache_dtype = spec.cache or dtype
    key_pages, value_pages = empty_cache(spec.layout, pages, spec.heads[1], spec.page_size, spec.head_dim, cache_dtype)
    for row, cached in enumerate(spec.prefixes):
        for token in range(0, cached, spec.page_size):
            page, count = int(table[row, token // spec.page_size]), min(spec.page_size, cached - token)
            for pool in (key_pages, value_pages):
                drawn = torch.randn(spec.heads[1], count, spec.head_dim, generator=generator)
                _fill(_raw(pool)[page], _raw(drawn.to(cache_dtype)))
    starts = torch.tensor([0, *spec.lengths]).cumsum(0).to(torch.int32)
    scales = (K_SCALE, V_SCALE) if spec.cache in FLOAT8 else (1.0, 1.0)
    by_head = spec.by_head and spec.cache in FLOAT8
    head_scales = scales_by_head(spec.heads[1]).unbind() if by_head else (None, None)
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "key_pages": key_pages,
        "value_pages": value_pages,
        "block_table": table,
        "prefix_lens": torch.tensor(spec.prefixes, dtype=torch.int32),
        "block_starts": starts,
        "mask_kinds": torch.tensor(spec.kinds, dtype=torch.int32),
        "scale": spec.scale * spec.head_dim**-0.5,
        "k_scale": torch.nan if by_head else scales[0],
        "v_scale": torch.nan if by_head else scales[1],
        "max_length": max(spec.lengths) + 2 * spec.loose,
        "max_prefix": max(spec.prefixes) + (spec.page_size + 1) * spec.loose,
        "output": torch.full(query.shape, torch.nan, dtype=dtype),
        "kind": spec.kinds[0] if len(set(spec.kinds)) == 1 else None,
        "k_scales": head_scales[0],
        "v_scales": head_scales[1],
    }
    return on_device(BlockAttention(**arguments), device)


def with_float8_query(call: BlockAttention) -> BlockAttention:
    """The call of a draft whose query vLLM has rounded, with a scale for each KV head."""
    kv_heads = call.key.shape[1]
    q_scales = scales_by_head(kv_heads)[0] / 64
    grouped = call.query.unflatten(1, (kv_heads, -1)).nan_to_num()
    rounded = (grouped / q_scales[:, None, None]).to(torch.float8_e4m3fn)
    query = (rounded.float() * q_scales[:, None, None]).to(call.query.dtype).flatten(1, 2)
    k_scales, v_scales = call.k_scales, call.v_scales
    if k_scales is None:
        k_scales, v_scales = (torch.tensor([scale]).expand(kv_heads) for scale in (call.k_scale, call.v_scale))
    return call._replace(
        query=query, float8_query=rounded.flatten(1, 2), q_scales=q_scales, k_scales=k_scales, v_scales=v_scales
    )


def _fill(page: Tensor, tokens: Tensor) -> None:
    """Write ``[kv_heads, count, head_dim]`` into the first places of a page, which may consist of tiles."""
    if page.dim() == 3:
        page[:, : tokens.shape[1]] = tokens
        return
    for place, token in enumerate(tokens.unbind(1)):
        group, inside = divmod(place, page.shape[2])
        page[:, group, inside] = token.unflatten(-1, page.shape[3:])


def on_device(call: BlockAttention, device: str) -> BlockAttention:
    """Copy a call's tensors to a device, strides included."""
    return BlockAttention(*(to_device(x, device) if isinstance(x, Tensor) else x for x in call))


def to_device(x: Tensor, device: str) -> Tensor:
    """Copy to a device with the same strides and storage size (``Tensor.to`` makes some views contiguous)."""
    if x.device.type == device:
        return x
    storage = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())
    moved = storage.to(device)
    return moved.as_strided(x.shape, x.stride(), x.storage_offset())


def _raw(x: Tensor) -> Tensor:
    """The bytes of a float8 tensor, which PyTorch cannot assign or compare everywhere; other tensors unchanged."""
    return x.view(torch.uint8) if x.element_size() == 1 else x


def bits(x: Tensor) -> Tensor:
    """Integers of the same bits, so that NaN equals NaN."""
    return (
        x.detach()
        .cpu()
        .contiguous()
        .view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    )


def oracle(call: BlockAttention) -> Tensor:
    """The float64 result, on CPU; NaN where nothing is written."""
    wide = on_device(call, "cpu")
    floats = ("query", "key", "value", "key_pages", "value_pages", "output")
    wide = wide._replace(**{x: getattr(wide, x).double() for x in floats if getattr(wide, x).element_size() > 1})
    wide.output.fill_(torch.nan)
    torch_ops.block_attention(wide)
    return wide.output


@functools.lru_cache(maxsize=64)
def _answered(
    spec: AttentionSpec, dtype: torch.dtype, device: str
) -> tuple[BlockAttention, dict[str, Tensor], Tensor, Tensor]:
    """Return arguments, the bits of their tensors, the float64 result and PyTorch's in ``dtype``.

    Kept, because several implementations and instruction sets get the same batches one after the other.
    """
    call = attention_arguments(spec, dtype, device)
    before = {name: bits(x).clone() for name, x in call._asdict().items() if isinstance(x, Tensor) and name != "output"}
    plain = call._replace(output=call.output.clone())
    torch_ops.block_attention(plain)
    return call, before, oracle(call), plain.output


def check(implementation: Any, spec: AttentionSpec, dtype: torch.dtype, device: str = "cpu") -> None:
    """Check that block_attention is not much less exact than PyTorch, and does not write its inputs.

    The error against float64 may be twice that of PyTorch in the same dtype, plus a floor: if PyTorch happens to be
    exact, one rounding of the result (half an epsilon) and, in float32, another order of summation must be allowed.
    """
    call, before, expected, plain = _answered(spec, dtype, device)
    call = call._replace(output=call.output.clone())
    implementation.block_attention(call)

    for name, known in before.items():
        assert torch.equal(bits(getattr(call, name)), known), f"{name} was written"
    used = sum(spec.lengths)
    found = call.output.cpu()
    assert not found[:used].isnan().any(), "NaN: unused slots or padding were read, or tokens were not written"
    if used == 0:
        return
    largest = expected[:used].abs().max()
    floor = float(largest) * torch.finfo(dtype).eps * (8 if dtype == torch.float32 else 0.5)
    allowed = 2 * (plain[:used].cpu().double() - expected[:used]).abs().max() + floor
    errors = (found[:used].double() - expected[:used]).abs()
    assert errors.max() <= allowed, (
        f"error {errors.max():.3g} at token {errors.flatten(1).amax(1).argmax()}, allowed {allowed:.3g}"
    )


def check_deterministic(
    implementation: Any, spec: AttentionSpec, dtype: torch.dtype, device: str = "cpu", runs: int = 20
) -> None:
    """Check that block_attention gives the same bits every time."""
    call = attention_arguments(spec, dtype, device)
    first = None
    for _ in range(runs):
        call.output.fill_(torch.nan)
        implementation.block_attention(call)
        found = bits(call.output).clone()
        first = found if first is None else first
        assert torch.equal(found, first), "two runs differ"


@dataclass(frozen=True)
class AcceptSpec:
    """One batch for accept_prefix: each row's drafts and its targets (one more)."""

    drafts: tuple[tuple[int, ...], ...]
    targets: tuple[tuple[int, ...], ...]


@st.composite
def accept_specs(draw: st.DrawFn, most_rows: int = 6, longest: int = 40) -> AcceptSpec:
    """Draw rows that agree for a while; after the first difference they may agree again."""
    tokens = st.sampled_from((0, 1, 2**40))  # the last does not fit 32 bits
    drafts, targets = [], []
    for _ in range(draw(st.integers(1, most_rows))):
        length = draw(st.one_of(st.just(0), st.integers(1, 4), st.integers(1, longest)))
        row = draw(st.lists(tokens, min_size=length, max_size=length))
        same = draw(st.integers(0, length))
        rest = draw(st.lists(tokens, min_size=length - same + 1, max_size=length - same + 1))
        drafts.append(tuple(row))
        targets.append((*row[:same], *rest))
    return AcceptSpec(tuple(drafts), tuple(targets))


def check_accept(implementation: Any, spec: AcceptSpec, device: str = "cpu") -> None:
    """Check accept_prefix against a loop over rows and tokens."""
    accepted, tokens, token_starts, seeds = [], [], [0], []
    for drafts, targets in zip(spec.drafts, spec.targets, strict=True):
        count = 0
        while count < len(drafts) and drafts[count] == targets[count]:
            count += 1
        accepted.append(count)
        tokens.extend(targets[: count + 1])
        token_starts.append(len(tokens))
        seeds.append(targets[count])
    tokens += [-1] * (sum(map(len, spec.targets)) - len(tokens))
    starts = torch.tensor([0, *map(len, spec.drafts)]).cumsum(0).to(torch.int32)
    found = implementation.accept_prefix(
        torch.tensor([token for row in spec.drafts for token in row], dtype=torch.int64, device=device),
        torch.tensor([token for row in spec.targets for token in row], dtype=torch.int64, device=device),
        starts.to(device),
    )
    expected = (
        torch.tensor(accepted, dtype=torch.int32),
        torch.tensor(tokens, dtype=torch.int64),
        torch.tensor(token_starts, dtype=torch.int32),
        torch.tensor(seeds, dtype=torch.int64),
    )
    for name, x, y in zip(("accepted", "tokens", "token_starts", "seeds"), found, expected, strict=True):
        assert x.dtype == y.dtype, f"{name}: {x.dtype}"
        assert torch.equal(x.cpu(), y), f"{name}: {x.tolist()} instead of {y.tolist()}"


@dataclass(frozen=True)
class BestSpec:
    """Logits for best_tokens: random ones, overwritten with a row's special values.

    Attributes:
        rows: rows of logits.
        vocab: columns.
        dtype: type of the logits.
        scale: scale of their normal distribution; 0 makes all equal.
        padding: columns after a row that are not part of it.
        ties: places that all get the row's largest value.
        nans: places of NaN.
        infinities: places of plus infinity.
        hidden: places below this are minus infinity.
        ascending: sorted, so that every logit is a new maximum.
        offset: added to all.
        seed: of the random numbers.
    """

    rows: int
    vocab: int
    dtype: torch.dtype
    scale: float = 3.0
    padding: int = 0
    ties: tuple[int, ...] = ()
    nans: tuple[int, ...] = ()
    infinities: tuple[int, ...] = ()
    hidden: int = 0
    ascending: bool = False
    offset: float = 0.0
    seed: int = 0

    def logits(self) -> Tensor:
        """Logits ``[rows, vocab]``; padding is plus infinity. Special values are in every row except the last."""
        drawn = torch.randn(self.rows, self.vocab, generator=torch.Generator().manual_seed(self.seed))
        drawn = (drawn * self.scale + self.offset).to(self.dtype)
        drawn = drawn.sort(-1).values if self.ascending else drawn
        special = drawn[: max(1, self.rows - 1)]
        special[:, list(self.ties)] = special.amax(-1, keepdim=True)
        special[:, : self.hidden] = -torch.inf
        special[:, list(self.infinities)] = torch.inf
        special[:, list(self.nans)] = torch.nan
        wide = torch.full((self.rows, self.vocab + self.padding), torch.inf, dtype=self.dtype)
        wide[:, : self.vocab] = drawn
        return wide[:, : self.vocab]


SEGMENT = 16384
"""Tokens in a segment of the C++ operator."""

GPU_SEGMENT = 4096
"""Tokens in a segment of the operators for GPUs."""

# What random drawing may miss in a short run; every implementation gets these as well.
BEST_SPECS = {
    "one row": BestSpec(1, 1000, torch.bfloat16),
    "one column": BestSpec(3, 1, torch.float16),
    "no whole vector": BestSpec(5, 131, torch.float32, padding=3),
    "ties in several segments": BestSpec(3, 3 * SEGMENT, torch.bfloat16, ties=(SEGMENT + 70, SEGMENT + 5, 2 * SEGMENT)),
    "all equal": BestSpec(2, 2 * SEGMENT + 1, torch.float16, scale=0.0),
    "ascending": BestSpec(2, 2 * SEGMENT, torch.float32, ascending=True),
    "NaN after a larger one": BestSpec(3, 2 * SEGMENT, torch.float32, nans=(90, 70, SEGMENT)),
    "NaN in the second segment": BestSpec(3, 2 * SEGMENT, torch.float16, nans=(SEGMENT + 9,)),
    "NaN in the rest of a step": BestSpec(2, 130, torch.bfloat16, nans=(129,)),
    "NaN after infinity": BestSpec(2, 200, torch.bfloat16, infinities=(3,), nans=(150, 160)),
    "infinity": BestSpec(2, 2 * SEGMENT, torch.bfloat16, infinities=(99, SEGMENT + 3)),
    "only minus infinity": BestSpec(1, 2 * SEGMENT, torch.bfloat16, hidden=2 * SEGMENT),
    "first segment hidden": BestSpec(2, 2 * SEGMENT, torch.float32, hidden=SEGMENT),
    "only the last seen": BestSpec(2, 2 * SEGMENT + 1, torch.float16, hidden=2 * SEGMENT),
    "float16 with subnormals": BestSpec(2, 5000, torch.float16, scale=1e-5),
    "lowest float32": BestSpec(2, 500, torch.float32, scale=0.0, offset=-3.4e38),
    "short segments": BestSpec(
        3, 3 * GPU_SEGMENT + 1, torch.bfloat16, ties=(3 * GPU_SEGMENT, GPU_SEGMENT + 9, GPU_SEGMENT + 8), padding=7
    ),
    "NaN in short segments": BestSpec(3, 2 * GPU_SEGMENT, torch.bfloat16, nans=(GPU_SEGMENT + 1030, GPU_SEGMENT + 7)),
    "far from zero": BestSpec(2, 131072, torch.float32, scale=0.5, offset=5000.0),
}


@st.composite
def best_specs(draw: st.DrawFn, longest: int = 2 * SEGMENT) -> BestSpec:
    """Draw sizes around whole vectors and segments, up to about ``longest``."""
    sizes = (1, 4, 16, 64, 128, 1000, GPU_SEGMENT, 2 * GPU_SEGMENT, SEGMENT, 2 * SEGMENT)
    around = st.sampled_from([size for size in sizes if size <= longest])
    vocab = max(1, draw(around) + draw(st.integers(-3, 3)))
    places = st.lists(st.integers(0, vocab - 1), max_size=3).map(tuple)
    rare = st.one_of(st.just(()), st.just(()), places)
    return BestSpec(
        rows=draw(st.integers(1, 4)),
        vocab=vocab,
        dtype=draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16))),
        scale=draw(st.sampled_from((0.0, 0.01, 3.0, 1000.0))),
        padding=draw(st.sampled_from((0, 1, 7))),
        ties=draw(places),
        nans=draw(rare),
        infinities=draw(rare),
        hidden=draw(st.sampled_from((0, 0, vocab // 2, vocab - 1, vocab))),
        ascending=draw(st.booleans()),
        offset=draw(st.sampled_from((0.0, 50.0, -3000.0))),
        seed=draw(st.integers(0, 5)),
    )


def check_best(implementation: Any, spec: BestSpec, device: str = "cpu") -> None:
    """Check best_tokens against argmax, and log-sum-exp in float64."""
    logits = spec.logits()
    expected = logits.float().argmax(-1)
    largest = logits.gather(1, expected[:, None]).squeeze(1).float()
    normalizer = torch.logsumexp(logits.double(), -1)
    given = torch.full((spec.rows, spec.vocab + spec.padding), torch.inf, dtype=spec.dtype, device=device)
    given = given[:, : spec.vocab].copy_(logits)
    for wanted in (True, False):
        found = [x.cpu() for x in implementation.best_tokens(given, wanted)]
        assert [x.dtype for x in found] == [torch.int64, torch.float32, torch.float32]
        assert torch.equal(found[0], expected), f"{found[0].tolist()} instead of {expected.tolist()}"
        torch.testing.assert_close(found[1], largest, rtol=0, atol=0, equal_nan=True)
        # Half a unit of the result's last place, and the float32 error of the sum of exponentials.
        torch.testing.assert_close(
            found[2].double(), normalizer if wanted else torch.empty(0).double(), rtol=1e-7, atol=3e-6, equal_nan=True
        )
    assert torch.equal(bits(given), bits(logits)), "logits were written"


def check_best_anywhere(implementation: Any, device: str = "cpu") -> None:
    """Check best_tokens on any row stride: every other row, one row many times, none."""
    logits = BestSpec(6, 300, torch.float32).logits().contiguous().to(device)
    tokens = logits.argmax(-1)
    assert torch.equal(implementation.best_tokens(logits[::2])[0], tokens[::2])
    assert torch.equal(implementation.best_tokens(logits[1].expand(4, 300))[0], tokens[1].expand(4))
    assert [len(x) for x in implementation.best_tokens(logits[:0])] == [0, 0, 0]


def check_best_alone(implementation: Any, device: str = "cpu") -> None:
    """Check that a row's results do not depend on the other rows, bit for bit."""
    logits = BestSpec(9, 3 * GPU_SEGMENT + 77, torch.bfloat16).logits().contiguous().to(device)
    together = implementation.best_tokens(logits)
    for rows in (slice(4, 5), slice(2, 9, 3)):
        for x, y in zip(implementation.best_tokens(logits[rows]), together, strict=True):
            assert torch.equal(bits(x), bits(y[rows]))
