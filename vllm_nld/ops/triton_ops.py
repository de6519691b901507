"""The operators of ``docs/operators.md`` as Triton kernels: for GPUs without a compiler at hand.

Nothing here waits for the GPU: launch sizes come from shapes and the host-side bounds, so that calls can be captured in
a CUDA graph (after one call outside, which compiles the kernels and, for ``move_kv``, uploads the table of caches).
"""

from __future__ import annotations

import importlib.util
import math
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from vllm_nld.ops import check_logits, fake_best_tokens
from vllm_nld.ops.pages import refuse_tiles

_LOG2E = math.log2(math.e)
_E4M3_SHIFT = 256.0
"""What decoding float8_e4m3fn leaves to the scale; see ``_float8_to_half``."""
_LEAST_SPLIT = 256
"""Cached tokens that are worth a program of their own."""
_MOST_SPLITS = 32
_SEGMENT = 4096
"""Logits that one program searches: a row of 131072 makes 32 programs. Independent of the batch, as results must be."""
_BYTES = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}


def unavailable(device: torch.device) -> str | None:
    """Say why these functions cannot run on a device; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'vllm-nld[triton]')"
    if device.type == "cuda":
        return None
    if device.type == "cpu" and _interpreted():
        return None
    return (
        f"Triton has no {device.type} device; its interpreter needs TRITON_INTERPRET=1 before anything imports Triton"
    )


@cache
def _interpreted() -> bool:
    """Whether Triton's own library came up interpreted: what counts is the environment when Triton was imported."""
    import triton.language as tl

    return type(tl.sum).__name__ == "InterpretedFunction"


def _kernels() -> Any:
    """Import on first use: without Triton, this module must still say why it is unavailable."""
    from vllm_nld.ops import triton_kernels

    return triton_kernels


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _tile_sizes(pairs: int, head_dim: int, element_size: int) -> tuple[int, int, int]:
    """Return BLOCK_M, BLOCK_N, BLOCK_D: products need 16 of each, and wide heads leave registers for fewer rows."""
    block_d = _power_of_two(head_dim)
    wide = block_d * element_size
    most = 64 if wide <= 256 else 32 if wide <= 512 else 16
    return min(most, max(16, _power_of_two(pairs))), 64 if wide <= 256 else 32, block_d


def split_count(programs: int, max_prefix: int, processors: int) -> int:
    """Return into how many parts prefixes are cut, so that a small batch with a long prefix fills the GPU."""
    wanted = -(-2 * processors // programs)
    return max(1, min(wanted, max_prefix // _LEAST_SPLIT, _MOST_SPLITS))


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    block_table: Tensor,
    prefix_lens: Tensor,
    block_starts: Tensor,
    mask_kinds: Tensor,
    mask_words: Tensor | None,
    scale: float,
    k_scale: float,
    v_scale: float,
    max_length: int,
    max_prefix: int,
    output: Tensor,
) -> None:
    """Write attention of every fresh token over its row's cached prefix and its own block (``docs/operators.md``)."""
    refuse_tiles(key_pages, "Triton")
    kernels = _kernels()
    tokens, heads, head_dim = query.shape
    rows, kv_heads = prefix_lens.shape[0], key.shape[1]
    group = heads // kv_heads
    if rows == 0 or max_length == 0:
        return
    block_m, block_n, block_d = _tile_sizes(max_length * group, head_dim, query.element_size())
    tiles = -(-max_length * group // block_m)
    splits = split_count(rows * tiles * kv_heads, max_prefix, _processors(query.device))

    float8 = key_pages.element_size() == 1
    if not float8:
        k_scale = v_scale = 1.0
    elif key_pages.dtype == torch.float8_e4m3fn:
        k_scale, v_scale = k_scale * _E4M3_SHIFT, v_scale * _E4M3_SHIFT
    pages = [pool.view(torch.uint8) if float8 else pool for pool in (key_pages, value_pages)]

    # Without splitting, the parts are never touched, but a kernel wants pointers.
    scratch: list[Tensor] = [output] * 3
    if splits > 1:
        parts = (tokens, heads, splits)
        scratch = [query.new_empty(size, dtype=torch.float32) for size in ((*parts, head_dim), parts, parts)]
    kernels.attention_kernel[(rows * tiles, kv_heads, splits)](
        query, key, value, *pages, block_table, prefix_lens, block_starts, mask_kinds,
        block_starts if mask_words is None else mask_words, output, *scratch,
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], *output.stride()[:2],
        *key_pages.stride(), *value_pages.stride(),
        block_table.stride(0), 0 if mask_words is None else mask_words.stride(0),
        tiles, splits, scale * _LOG2E, scale * k_scale * _LOG2E, v_scale,
        HEADS=heads, GROUP=group, D=head_dim, PAGE=key_pages.shape[2],
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d,
        WORDS=mask_words is not None, FP8=float8, E5M2=key_pages.dtype == torch.float8_e5m2,
        SPLIT=splits > 1, UPCAST=_interpreted(),
        num_warps=8 if block_m * block_d >= 64 * 128 else 4, num_stages=2,
    )  # fmt: skip
    if splits > 1:
        kernels.merge_kernel[(tokens, heads)](
            *scratch, block_starts, output, rows, splits, *output.stride()[:2],
            HEADS=heads, D=head_dim, BLOCK_S=_power_of_two(_MOST_SPLITS), BLOCK_D=block_d,
        )  # fmt: skip


def accept_prefix(drafts: Tensor, targets: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return accepted, tokens, token_starts and seeds (``docs/operators.md``)."""
    kernels = _kernels()
    rows = starts.shape[0] - 1
    accepted = starts.new_empty(rows)
    tokens = torch.full_like(targets, -1)
    token_starts = torch.zeros_like(starts)
    seeds = targets.new_empty(rows)
    if rows > 0:
        kernels.count_kernel[(rows,)](drafts, targets, starts, accepted, BLOCK=64)
        kernels.pack_kernel[(rows,)](targets, starts, accepted, tokens, token_starts, seeds, BLOCK=64)
    return accepted, tokens, token_starts, seeds


def move_kv(caches: list[Tensor], sources: Tensor, targets: Tensor) -> None:
    """Copy keys and values of every source slot to its target slot, in all layers (``docs/operators.md``)."""
    kernels = _kernels()
    if not caches or sources.shape[0] == 0:
        return
    import triton.language as tl

    for width in {pool.element_size() for pool in caches}:  # all caches of a model are of one dtype: one launch
        chosen = [pool for pool in caches if pool.element_size() == width]
        described = tuple((pool.data_ptr(), *pool.shape[1:], *pool.stride()) for pool in chosen)
        kernels.move_kernel[(sources.shape[0], len(chosen))](
            _cache_table(described, sources.device), sources, targets,
            FIELDS=len(described[0]), TYPE=getattr(tl, _BYTES[width]), BLOCK=256,
        )  # fmt: skip


@lru_cache(maxsize=16)
def _cache_table(described: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Return int64 ``[caches, 8]`` for ``move_kernel``; uploaded once, as an engine's caches never move."""
    return torch.tensor(described, dtype=torch.int64, device=device)


def best_tokens(logits: Tensor, with_normaliser: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's most probable token, its logit and the row's normaliser (``docs/operators.md``).

    Raises:
        NLDError: the logits are not two-dimensional, contiguous within rows, and of an allowed dtype.
    """
    check_logits(logits)
    kernels = _kernels()
    rows, vocab = logits.shape
    tokens, largest, normalisers = fake_best_tokens(logits, with_normaliser)
    if rows == 0:
        return tokens, largest, normalisers
    segments = -(-vocab // _SEGMENT)
    tops = logits.new_empty(rows, segments, dtype=torch.float32)
    places = logits.new_empty(rows, segments, dtype=torch.int32)
    totals = torch.empty_like(tops) if with_normaliser else tops
    kernels.best_kernel[(rows, segments)](
        logits, tops, places, totals, logits.stride(0), vocab, BLOCK=_SEGMENT, SUM=with_normaliser
    )
    kernels.best_merge_kernel[(rows,)](
        tops, places, totals, tokens, largest, normalisers if with_normaliser else largest,
        SEGMENTS=segments, BLOCK=_power_of_two(segments), SUM=with_normaliser,
    )  # fmt: skip
    return tokens, largest, normalisers
