"""Attention of a draft pass: every token of a block sees its request's cached prefix and its whole block.

This is the plain PyTorch form; native kernels replace this one function.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def block_attention(
    query: Tensor, key: Tensor, value: Tensor, prefix: tuple[Tensor, Tensor], mask: Tensor | None, scale: float
) -> Tensor:
    """Return the attention output ``[rows, length, heads, head_dim]``.

    All queries of a block see the same keys, so the query heads that share a KV head are folded into the query
    dimension instead of repeating keys and values.

    Args:
        query: ``[rows, length, heads, head_dim]``.
        key: the block's own keys, ``[rows, length, kv_heads, head_dim]``; rotary embedding applied.
        value: like ``key``.
        prefix: cached keys and values, each ``[rows, kv_heads, prefix, head_dim]``.
        mask: bool ``[rows, 1, 1, prefix + length]``, True where a key exists; None when all do.
        scale: multiplier of the scores.
    """
    rows, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    group = heads // kv_heads
    keys = _append(prefix[0], key)
    values = _append(prefix[1], value)
    folded = query.view(rows, length, kv_heads, group, head_dim).permute(0, 2, 3, 1, 4)
    folded = folded.reshape(rows, kv_heads, group * length, head_dim)
    out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
    out = out.view(rows, kv_heads, group, length, head_dim).permute(0, 3, 1, 2, 4)
    return out.reshape(rows, length, heads, head_dim)


def _append(prefix: Tensor, fresh: Tensor) -> Tensor:
    """Concatenate ``[rows, kv_heads, prefix, head_dim]`` and ``[rows, length, kv_heads, head_dim]`` along tokens."""
    rows, kv_heads, cached, head_dim = prefix.shape
    joined = prefix.new_empty(rows, kv_heads, cached + fresh.shape[1], head_dim)
    joined[:, :, :cached] = prefix
    joined[:, :, cached:] = fresh.transpose(1, 2)
    return joined
