"""The operators of ``docs/developer/operators.md`` as Triton kernels: for GPUs without nvcc.

Nothing here waits for the GPU: launch sizes come from shapes and the host-side bounds, so that calls can be captured in
a CUDA graph (after one call outside, which compiles the kernels).
"""

from __future__ import annotations

import importlib.util
import math
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from vllm_nld.ops.arguments import BlockAttention, check_logits, empty_best
from vllm_nld.ops.implementation import Implementation
from vllm_nld.ops.pages import refuse_tiles
from vllm_nld.ops.sizes import power_of_two

_LOG2E = math.log2(math.e)
_E4M3_SHIFT = 256.0
"""Factor that decoding float8_e4m3fn leaves to the scale; see ``_float8_to_half``."""
_LEAST_SPLIT = 256
"""Fewest cached tokens for a program of their own."""
_MOST_SPLITS = 32
_SEGMENT = 4096
"""Logits that one program searches: a row of 131072 makes 32 programs. Independent of the batch, as results must be."""


def unavailable(device: torch.device) -> str | None:
    """Return why these functions cannot run on a device; None if they can."""
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
    """Whether Triton interprets its kernels. The environment at Triton's import decides that."""
    import triton.language as tl

    return type(tl.sum).__name__ == "InterpretedFunction"


def _kernels() -> Any:
    """Import on first use: without Triton, this module must still explain that."""
    from vllm_nld.ops import triton_kernels

    return triton_kernels


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _tile_sizes(pairs: int, head_dim: int, element_size: int) -> tuple[int, int, int]:
    """Return BLOCK_M, BLOCK_N, BLOCK_D: products need 16 of each, and wide heads leave registers for fewer rows."""
    block_d = power_of_two(head_dim)
    wide = block_d * element_size
    most = 64 if wide <= 256 else 32 if wide <= 512 else 16
    return min(most, max(16, power_of_two(pairs))), 64 if wide <= 256 else 32, block_d


def split_count(programs: int, max_prefix: int, processors: int) -> int:
    """Return the number of parts of each prefix, so that a small batch with a long prefix fills the GPU."""
    wanted = -(-2 * processors // programs)
    return max(1, min(wanted, max_prefix // _LEAST_SPLIT, _MOST_SPLITS))


def block_attention(call: BlockAttention) -> None:
    """Write attention of every fresh token over its row's cached prefix and its own block into ``call.output``.

    Raises:
        NLDError: the pages are in tiles.
    """
    query, key, value, output = call.query, call.key, call.value, call.output
    key_pages, k_scale, v_scale = call.key_pages, call.k_scale, call.v_scale
    refuse_tiles(key_pages, "Triton")
    kernels = _kernels()
    tokens, heads, head_dim = query.shape
    rows, kv_heads = call.prefix_lens.shape[0], key.shape[1]
    group = heads // kv_heads
    if rows == 0 or call.max_length == 0:
        return
    block_m, block_n, block_d = _tile_sizes(call.max_length * group, head_dim, query.element_size())
    tiles = -(-call.max_length * group // block_m)
    splits = split_count(rows * tiles * kv_heads, call.max_prefix, _processors(query.device))

    float8 = key_pages.element_size() == 1
    k_scales = v_scales = call.prefix_lens  # not followed unless by head, but a kernel needs pointers
    by_head = False
    if float8 and call.k_scales is not None and call.v_scales is not None:
        k_scales, v_scales, by_head = call.k_scales, call.v_scales, True
    if by_head or not float8:
        k_scale = v_scale = 1.0
    if key_pages.dtype == torch.float8_e4m3fn:
        k_scale, v_scale = k_scale * _E4M3_SHIFT, v_scale * _E4M3_SHIFT
    pages = [pool.view(torch.uint8) if float8 else pool for pool in (key_pages, call.value_pages)]

    # Without splitting, the parts are never accessed, but a kernel needs pointers.
    scratch: list[Tensor] = [output] * 3
    if splits > 1:
        parts = (tokens, heads, splits)
        scratch = [query.new_empty(size, dtype=torch.float32) for size in ((*parts, head_dim), parts, parts)]
    kernels.attention_kernel[(rows * tiles, kv_heads, splits)](
        query, key, value, *pages, call.block_table, call.prefix_lens, call.block_starts, call.mask_kinds,
        output, *scratch,
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], *output.stride()[:2],
        *key_pages.stride(), *call.value_pages.stride(), call.block_table.stride(0),
        tiles, splits, call.scale * _LOG2E, call.scale * k_scale * _LOG2E, v_scale,
        k_scales, v_scales, k_scales.stride(0), v_scales.stride(0),
        HEADS=heads, GROUP=group, D=head_dim, PAGE=key_pages.shape[2],
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d,
        FP8=float8, E5M2=key_pages.dtype == torch.float8_e5m2, BY_HEAD=by_head, SPLIT=splits > 1,
        UPCAST=_interpreted(),
        num_warps=8 if block_m * block_d >= 64 * 128 else 4, num_stages=2,
    )  # fmt: skip
    if splits > 1:
        kernels.merge_kernel[(tokens, heads)](
            *scratch, call.block_starts, output, rows, splits, *output.stride()[:2],
            HEADS=heads, D=head_dim, BLOCK_S=power_of_two(_MOST_SPLITS), BLOCK_D=block_d,
        )  # fmt: skip


def accept_prefix(drafts: Tensor, targets: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return accepted, tokens, token_starts and seeds (``docs/developer/operators.md``)."""
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


def best_tokens(logits: Tensor, with_normalizer: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's most probable token, its logit and the row's normalizer (``docs/developer/operators.md``).

    Raises:
        NLDError: the logits are not two-dimensional, contiguous within rows, and of an allowed dtype.
    """
    check_logits(logits)
    kernels = _kernels()
    rows, vocab = logits.shape
    tokens, largest, normalizers = empty_best(logits, with_normalizer)
    if rows == 0:
        return tokens, largest, normalizers
    segments = -(-vocab // _SEGMENT)
    tops = logits.new_empty(rows, segments, dtype=torch.float32)
    places = logits.new_empty(rows, segments, dtype=torch.int32)
    totals = torch.empty_like(tops) if with_normalizer else tops
    kernels.best_kernel[(rows, segments)](
        logits, tops, places, totals, logits.stride(0), vocab, BLOCK=_SEGMENT, SUM=with_normalizer
    )
    kernels.best_merge_kernel[(rows,)](
        tops, places, totals, tokens, largest, normalizers if with_normalizer else largest,
        SEGMENTS=segments, BLOCK=power_of_two(segments), SUM=with_normalizer,
    )  # fmt: skip
    return tokens, largest, normalizers


IMPLEMENTATION = Implementation(
    name="triton",
    devices=("cuda",),
    block_attention=block_attention,
    accept_prefix=accept_prefix,
    best_tokens=best_tokens,
    needs="`pip install 'vllm-nld[triton]'`",
    package="triton",
    obstacle=unavailable,
    graph_safe=True,
)
