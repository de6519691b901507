"""Arguments of the operators (docs/developer/operators.md), and the empty results that some implementations fill."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vllm_nld.errors import NLDError

BIDIRECTIONAL, CAUSAL = 0, 1
"""Mask kinds: which fresh tokens of its own block a query attends to. All, or those up to itself."""


class BlockAttention(NamedTuple):
    """One call of ``block_attention``: R rows, each a cached prefix in KV pages and a block of fresh tokens.

    A named tuple and not a dataclass: it is as immutable, but costs 1.1 instead of 2.6 microseconds per call (of 7),
    and there is one per layer and draft pass. The fields up to ``output`` are in the order of the C++ operator's
    schema, which takes them by position.

    T tokens, H query heads, Hkv KV heads (H is a multiple of it), D head size (a multiple of 16, 32 to 256), P pages of
    S tokens. All tensors are on one device. Query, key, value and output have a contiguous last dimension, and any
    token and head strides.

    Attributes:
        query: float32, bfloat16 or float16 ``[T, H, D]``, the fresh tokens of all rows end to end. Tokens after
            ``block_starts[R]`` are padding.
        key: ``[T, Hkv, D]`` in the query's dtype, rotary embedding applied.
        value: ``[T, Hkv, D]`` in the query's dtype.
        key_pages: ``[P, Hkv, S, D]``, a view of the cache with any strides, in the query's dtype, float8_e4m3fn or
            float8_e5m2; or tiles with six dimensions, for implementations that read them.
        value_pages: like ``key_pages``.
        block_table: int32 ``[R, M]``, the ids of each row's pages; entries after the prefix are never read.
        prefix_lens: int32 ``[R]``, cached tokens of each row, 0 or more; need not fill whole pages.
        block_starts: int32 ``[R + 1]``; row r's fresh tokens are ``block_starts[r]`` to ``block_starts[r + 1] - 1``,
            perhaps none.
        mask_kinds: int32 ``[R]``, ``BIDIRECTIONAL`` or ``CAUSAL``.
        scale: multiplies the scores; more than 0.
        k_scale: multiplies cached keys if they are float8; ignored otherwise, and if there are ``k_scales``.
        v_scale: multiplies cached values if they are float8; ignored otherwise, and if there are ``v_scales``.
        max_length: tokens of the longest block, or more. On the host, for the grids of GPU kernels: C++ and PyTorch
            do not read it.
        max_prefix: tokens of the longest prefix, or more; only GPU kernels read it, to decide how prefixes are split.
        output: ``[T, H, D]`` in the query's dtype; written for the rows' tokens; what
            padding holds afterwards is not defined.
        kind: what all ``mask_kinds`` are, if the host knows that; else None. FlashAttention takes its mask from the
            host; no other implementation reads this.
        padded: whether there may be padding, as far as the host knows. FlashAttention reads the values of padding,
            which must then be numbers; no other implementation reads this.
        k_scales: float32 ``[Hkv]``, any stride, on the device: multiply the cached keys of each KV head if they are
            float8; None: ``k_scale`` does. C++ refuses them: on CPUs, vLLM has one scale for all heads.
        v_scales: the same of values; there if ``k_scales`` are.
        float8_query: float8_e4m3fn ``[T, H, D]``, what vLLM has rounded the query to, if its own attention multiplies
            float8 queries by float8 keys; ``query`` is this, dequantized. Only FlashAttention reads it.
        q_scales: float32 ``[Hkv]``, any stride, on the device: multiply ``float8_query``; there if that is.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_pages: Tensor
    value_pages: Tensor
    block_table: Tensor
    prefix_lens: Tensor
    block_starts: Tensor
    mask_kinds: Tensor
    scale: float
    k_scale: float
    v_scale: float
    max_length: int
    max_prefix: int
    output: Tensor
    kind: int | None = None
    padded: bool = True
    k_scales: Tensor | None = None
    v_scales: Tensor | None = None
    float8_query: Tensor | None = None
    q_scales: Tensor | None = None

    def page_scales(self) -> tuple[float | Tensor, float | Tensor]:
        """Return what multiplies float8 keys and values of shape ``[..., Hkv, tokens, D]``."""
        if self.k_scales is None or self.v_scales is None:
            return self.k_scale, self.v_scale
        return self.k_scales[:, None, None], self.v_scales[:, None, None]


def check_logits(logits: Tensor) -> None:
    """Raise NLDError for logits that ``best_tokens`` does not take, as the C++ operator does for its own."""
    if logits.dim() != 2:
        raise NLDError(f"best_tokens: logits has {logits.dim()} dimensions; needed: 2")
    if logits.shape[1] == 0:
        raise NLDError("best_tokens: logits has no columns; needed: 1 or more")
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise NLDError(f"best_tokens: logits has inner stride {logits.stride(1)}; needed: 1")
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise NLDError(f"best_tokens: logits is {logits.dtype}; allowed: float32, bfloat16, float16")


def empty_best(logits: Tensor, with_normalizer: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return uninitialized results of ``best_tokens``: tokens, largest, normalizer (docs/developer/operators.md)."""
    rows = logits.shape[0]
    return (
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty(rows if with_normalizer else 0, dtype=torch.float32),
    )
