"""``block_attention`` (docs/developer/operators.md) by xformers: its kernels over prefix and block, merged.

Each part is one of xformers' own attention biases over tokens laid end to end, so nothing is padded and no mask exists.
The biases hold lengths on the host, so every call waits for the GPU once, and cannot be captured in a CUDA graph.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vllm_nld.errors import NLDError
from vllm_nld.ops.arguments import CAUSAL, BlockAttention
from vllm_nld.ops.implementation import HALF, Implementation
from vllm_nld.ops.pages import refuse_tiles

_PAGE = 16
"""Page sizes that xformers reads in place are multiples of this."""


def unavailable(device: torch.device) -> str | None:
    """Return why this function cannot run on a device; None if it can."""
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed (pip install 'vllm-nld[xformers]')"
    if device.type != "cuda":
        return f"xformers has kernels for CUDA devices only, not for {device.type}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "xformers' partial attention needs compute capability 8.0 (Ampere) or newer"
    return None


@dataclass(frozen=True)
class Part:
    """Attention of some tokens over some keys: output ``[tokens, H, D]`` and log-sum-exp float32 ``[tokens, H]``."""

    output: Tensor
    lse: Tensor


@dataclass(frozen=True)
class Rows:
    """Some rows of a batch.

    Attributes:
        numbers: which rows.
        lengths: fresh tokens of each.
        tokens: int64, their fresh tokens' places in the batch, end to end.
    """

    numbers: list[int]
    lengths: list[int]
    tokens: Tensor


def block_attention(call: BlockAttention) -> None:
    """Write attention of every fresh token over its row's cached prefix and its own block into ``call.output``.

    Raises:
        NLDError: the pages are in tiles, or none of xformers' kernels takes these tensors; the message says why.
    """
    refuse_tiles(call.key_pages, "xformers")
    query, key, value, output = call.query, call.key, call.value, call.output
    host = torch.cat((call.prefix_lens, call.mask_kinds, call.block_starts)).tolist()  # one wait instead of three
    count = call.prefix_lens.shape[0]
    cached, kinds, starts = host[:count], host[count : 2 * count], host[2 * count :]
    lengths = [b - a for a, b in pairwise(starts)]
    filled = [row for row in range(count) if lengths[row]]

    def rows(numbers: list[int]) -> Rows:
        places = [torch.arange(starts[row], starts[row + 1]) for row in numbers]
        return Rows(numbers, [lengths[row] for row in numbers], torch.cat(places).to(query.device))

    for kind in {kinds[row] for row in filled}:
        chosen = rows([row for row in filled if kinds[row] == kind])
        bias = _biases().BlockDiagonalMask.from_seqlens(chosen.lengths, device=query.device)
        q, k, v = (x[chosen.tokens] for x in (query, key, value))
        part = _attend(q, k, v, bias.make_causal() if kind == CAUSAL else bias, call.scale)
        with_prefix = [row for row in chosen.numbers if cached[row]]
        output[chosen.tokens] = part.output
        if with_prefix:
            seen = rows(with_prefix)
            keys, values, bias = _prefix(call, seen, [cached[row] for row in with_prefix])
            prefix = _attend(query[seen.tokens], keys, values, bias, call.scale)
            inside = torch.isin(chosen.tokens, seen.tokens, assume_unique=True)
            output[seen.tokens] = merge(prefix, Part(part.output[inside], part.lse[inside])).to(output.dtype)


def merge(first: Part, second: Part) -> Tensor:
    """Return the attention over both parts' keys, ``[tokens, H, D]``; a part without keys has a log-sum-exp of -inf."""
    fmha = _fmha()
    outputs = torch.stack((first.output, second.output))[:, None]  # [2, 1, tokens, H, D]
    lse = torch.stack((first.lse, second.lse)).transpose(1, 2)[:, None]  # [2, 1, H, tokens]
    merged: Tensor = fmha.merge_attentions(outputs, lse, write_lse=False)[0]
    return merged[0]


def _attend(query: Tensor, keys: Tensor, values: Tensor, bias: Any, scale: float) -> Part:
    """Attend with a bias that is block-diagonal over query ``[tokens, H, D]`` and keys and values ``[K, Hkv, D]``."""
    heads, kv_heads = query.shape[1], keys.shape[1]
    q, k, v = (_grouped(x[None], kv_heads, heads) for x in (query, keys, values))
    out, lse = _partial(q, k, v, bias, scale)
    return Part(out[0].flatten(1, 2), lse[0, ..., : query.shape[0]].flatten(0, 1).T.float())


def _grouped(x: Tensor, kv_heads: int, heads: int) -> Tensor:
    """Bring ``[B, M, heads or kv_heads, D]`` into xformers' grouped form ``[B, M, Hkv, H / Hkv, D]`` without a copy."""
    x = x.view(*x.shape[:2], kv_heads, x.shape[2] // kv_heads, x.shape[3])
    return x.expand(-1, -1, -1, heads // kv_heads, -1)


def _prefix(call: BlockAttention, rows: Rows, cached: list[int]) -> tuple[Tensor, Tensor, Any]:
    """Return keys, values ``[K, Hkv, D]`` and the bias that shows every row its prefix, of ``cached`` tokens, in them.

    Pages are read in place where xformers can; otherwise the used ones are copied, dequantized, row after row.
    """
    pools, scales = (call.key_pages, call.value_pages), call.page_scales()
    table, query = call.block_table, call.query
    biases, size = _biases(), call.key_pages.shape[2]
    width = -(-max(cached) // size)
    used = torch.tensor([-(-n // size) for n in cached], device=table.device)
    ids = table[torch.tensor(rows.numbers, device=table.device), :width]
    # Entries after the prefix may be anything; xformers needs ids of pages that exist.
    ids = ids.masked_fill(torch.arange(width, device=table.device) >= used[:, None], 0)
    if all(in_place(pool, query.dtype) for pool in pools):
        bias = biases.PagedBlockDiagonalPaddedKeysMask.from_seqlens(
            rows.lengths, cached, ids.contiguous(), size, device=query.device
        )
        keys, values = (pool.transpose(1, 2).flatten(0, 1) for pool in pools)
        return keys, values, bias
    bias = biases.BlockDiagonalPaddedKeysMask.from_seqlens(rows.lengths, width * size, cached, device=query.device)
    # Unused slots may be NaN, and a kernel may multiply them by zero.
    unused = torch.arange(width * size, device=query.device) >= torch.tensor(cached, device=query.device)[:, None]
    copies = []
    for pool, scale in zip(pools, scales, strict=True):
        copied = pool[ids.long()]
        if pool.element_size() == 1:
            copied = (copied.float() * scale).to(query.dtype)
        copied = copied.permute(0, 1, 3, 2, 4).flatten(1, 2)  # [rows, width * S, Hkv, D]
        copies.append(copied.masked_fill(unused[..., None, None], 0.0).flatten(0, 1))
    return copies[0], copies[1], bias


def in_place(pages: Tensor, dtype: torch.dtype) -> bool:
    """Whether xformers can read pages ``[P, Hkv, S, D]`` where they are: one token after the other, across pages."""
    size = pages.shape[2]
    contiguous = pages.stride(3) == 1 and pages.stride(0) == size * pages.stride(2)
    return contiguous and pages.dtype == dtype and size % _PAGE == 0


def _partial(query: Tensor, keys: Tensor, values: Tensor, bias: Any, scale: float) -> tuple[Tensor, Tensor]:
    """Call the first of xformers' kernels that takes the input; output and log-sum-exp in its own shapes.

    By itself, xformers looks for partial attention only among the kernels with a backward pass.
    """
    objections = []
    page_size = getattr(bias, "page_size", None)
    for operator in _operators(page_size):
        try:
            result: tuple[Tensor, Tensor] = _fmha().memory_efficient_attention_partial(
                query, keys, values, bias, scale=scale, op=operator
            )
            return result
        except _refusals() as error:
            objections.append(f"{operator.NAME}: {error}")
    raise NLDError(
        "no kernel of xformers takes this attention; choose another implementation\n" + "\n".join(objections)
    )


@cache
def _refusals() -> tuple[type[Exception], ...]:
    """What a kernel raises that does not take its input: split-K fails to compile under Triton 3.9 (block pointers)."""
    import triton

    return ValueError, triton.CompilationError


@cache
def _operators(page_size: int | None) -> tuple[Any, ...]:
    """xformers' kernels that return a log-sum-exp, the faster first; split-K steps through pages of their own size."""
    from xformers.ops.fmha import flash, triton_splitk

    split = triton_splitk.FwOp
    if page_size is not None and page_size % split.BLOCK_N:
        small = 32 if page_size % 32 == 0 else 16
        split = type(f"{split.__name__}Page{small}", (split,), {"BLOCK_N": small, "NAME": f"{split.NAME}_page{small}"})
    return flash.FwOp, split


def _fmha() -> Any:
    """Import on first use: without xformers, this module must still explain that."""
    from xformers.ops import fmha

    return fmha


def _biases() -> Any:
    from xformers.ops.fmha import attn_bias

    return attn_bias


IMPLEMENTATION = Implementation(
    name="xformers",
    devices=("cuda",),
    block_attention=block_attention,
    needs="`pip install 'vllm-nld[xformers]'`, compute capability 8.0",
    package="xformers",
    obstacle=unavailable,
    dtypes=HALF,
    copies_float8=True,
)
