"""``block_attention`` (docs/developer/operators.md) by vLLM's own FlashAttention: over pages and block, merged.

FlashAttention returns each part's log-sum-exp, and vLLM's merge kernel weighs the parts by it. Sizes of launches come
from shapes and the host-side bounds, so a CUDA graph may capture a call.

FlashAttention multiplies float8 pages by float8 queries only (version 3 on Hopper, 4 on Blackwell). Where vLLM's own
attention does that, it has rounded the query already, and the call brings the result along.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from vllm_nld.errors import NLDError
from vllm_nld.ops.arguments import CAUSAL, BlockAttention
from vllm_nld.ops.implementation import HALF, Implementation
from vllm_nld.ops.pages import refuse_tiles


def unavailable(device: torch.device) -> str | None:
    """Return why this function cannot run on a device; None if it can."""
    if torch.version.cuda is None:
        return "torch is not built for CUDA"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "FlashAttention needs compute capability 8.0 (Ampere) or newer"
    try:
        return None if _flash()[0]() else "this vLLM has no FlashAttention"
    except ImportError as error:
        return f"vLLM's FlashAttention cannot be imported: {error}"


def block_attention(call: BlockAttention) -> None:
    """Write attention of every fresh token over its row's cached prefix and its own block into ``call.output``.

    Raises:
        NLDError: the pages are in tiles, or the query is float32, which FlashAttention does not take.
    """
    refuse_tiles(call.key_pages, "FlashAttention")
    if call.query.dtype not in HALF:
        raise NLDError(f"FlashAttention: query is {call.query.dtype}; allowed: bfloat16, float16")
    if call.prefix_lens.shape[0] == 0 or call.max_length == 0:
        return
    own, own_lse = _own_block(call)
    if call.max_prefix == 0:
        call.output.copy_(own)
        return
    from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

    prefix, prefix_lse = _prefix(call)
    merged = call.output if call.output.is_contiguous() else torch.empty_like(prefix)
    merge_attn_states(merged, prefix, prefix_lse, own, own_lse)
    if merged is not call.output:
        call.output.copy_(merged)


def _own_block(call: BlockAttention) -> tuple[Tensor, Tensor]:
    """Attend inside blocks: output ``[T, H, D]`` and log-sum-exp float32 ``[H, T]``."""
    value = call.value
    if call.padded:  # the kernel multiplies the values after the last row by zero
        value = value.masked_fill((_places(call) >= call.block_starts[-1])[:, None, None], 0.0)

    def attend(causal: bool) -> tuple[Tensor, Tensor]:
        return _attend(call, call.key, value, call.max_length, causal, call.query, cu_seqlens_k=call.block_starts)

    if call.kind is not None:
        return attend(call.kind == CAUSAL)
    # The kinds are on the device, so both masks are computed.
    (seen, seen_lse), (own, own_lse) = attend(True), attend(False)
    rows = torch.searchsorted(call.block_starts, _places(call), right=True) - 1
    causal = (call.mask_kinds == CAUSAL)[rows.clamp(max=call.mask_kinds.shape[0] - 1)]
    return torch.where(causal[:, None, None], seen, own), torch.where(causal, seen_lse, own_lse)


def _places(call: BlockAttention) -> Tensor:
    return torch.arange(call.query.shape[0], device=call.query.device)


def _prefix(call: BlockAttention) -> tuple[Tensor, Tensor]:
    """Attend to cached prefixes; the log-sum-exp of an empty one is infinite, and the merge leaves it out."""
    keys, values, table = call.key_pages, call.value_pages, call.block_table
    query, factors = call.query, {}
    if keys.dtype != query.dtype and call.float8_query is not None:
        query, factors = call.float8_query, _factors(call)
    elif keys.dtype != query.dtype:
        ids = _used_pages(call)
        keys, values = (
            (pool[ids].float() * scale).to(query.dtype).flatten(0, 1)
            for pool, scale in zip((keys, values), call.page_scales(), strict=True)
        )
        table = torch.arange(ids.numel(), dtype=torch.int32, device=ids.device).view(ids.shape)
    pools = (keys.transpose(1, 2), values.transpose(1, 2))  # [pages, page size, KV heads, head size]
    output, lse = _attend(
        call, *pools, call.max_prefix, False, query, seqused_k=call.prefix_lens, block_table=table, **factors
    )
    return output.to(call.query.dtype), lse  # of float8 it is bfloat16


def _factors(call: BlockAttention) -> dict[str, Tensor]:
    """Return what multiplies float8 queries, keys and values, as FlashAttention wants it: ``[R, Hkv]``."""
    shape = (call.prefix_lens.shape[0], call.key.shape[1])
    scales = {"q_descale": call.q_scales, "k_descale": call.k_scales, "v_descale": call.v_scales}
    missing = [name for name, scale in scales.items() if scale is None]
    if missing:
        raise NLDError(f"FlashAttention: float8_query without {', '.join(missing)}; all three are needed")
    return {name: scale.expand(shape) for name, scale in scales.items() if scale is not None}


def _used_pages(call: BlockAttention) -> Tensor:
    """Return int64 ``[R, pages of the longest prefix]``: ids of each row's pages, then zeros."""
    table, size = call.block_table, call.key_pages.shape[2]
    table = table[:, : -(-call.max_prefix // size)]
    used = -(-call.prefix_lens // size)
    unused = torch.arange(table.shape[1], device=table.device) >= used[:, None]
    return table.masked_fill(unused, 0).long()


def _attend(
    call: BlockAttention, keys: Tensor, values: Tensor, longest: int, causal: bool, query: Tensor, **others: Tensor
) -> tuple[Tensor, Tensor]:
    """Attend to some keys: output ``[T, H, D]`` and log-sum-exp float32 ``[H, T]``."""
    _, version, attention = _flash()
    output, lse = attention(
        q=query, k=keys, v=values, cu_seqlens_q=call.block_starts, max_seqlen_q=call.max_length,
        max_seqlen_k=longest, softmax_scale=call.scale, causal=causal, return_softmax_lse=True,
        fa_version=version(head_size=query.shape[2]), **others,
    )  # fmt: skip
    return output, lse


@cache
def _flash() -> tuple[Any, Any, Any]:
    """Import on first use: whether vLLM has FlashAttention, its version by head size, and the function."""
    from vllm.v1.attention.backends import fa_utils

    version = cache(fa_utils.get_flash_attn_version)
    return fa_utils.is_flash_attn_varlen_func_available, version, fa_utils.flash_attn_varlen_func


IMPLEMENTATION = Implementation(
    name="flash",
    devices=("cuda",),
    block_attention=block_attention,
    needs="vLLM's FlashAttention, compute capability 8.0",
    obstacle=unavailable,
    dtypes=HALF,
    graph_safe=True,
    first_in_graphs=True,
    copies_float8=True,
)
