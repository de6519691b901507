"""Which page layout an attention layer's cache has.

A probe finds it, so that a changed layout stops with an error instead of wrong drafts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_nld.errors import NLDError
from vllm_nld.ops.pages import LAYOUTS, PageLayout, page_size

_PROBE_PAGES = 3
_FLOAT8_STEP = 0.26
"""Relative error that a writer of float8 may make with a number that float8 holds: a bfloat16 times a scale is rounded,
and a writer that cuts off then stores the next smaller one, in e5m2 a quarter less."""


def typed_cache(layer: Any) -> Tensor:
    """Return an attention layer's cache; vLLM keeps float8 as bytes, here they get their dtype."""
    cache: Tensor = layer.kv_cache
    return cache.view(float8_dtype(layer)) if cache.dtype == torch.uint8 else cache


def float8_dtype(layer: Any) -> torch.dtype:
    """Return which float8 a layer's bytes are: what :func:`find_layout` found, and before that what the option says."""
    named = torch.float8_e5m2 if layer.kv_cache_dtype == "fp8_e5m2" else torch.float8_e4m3fn
    found: torch.dtype = getattr(layer, "nld_float8_dtype", named)
    return found


def scales(layer: Any) -> tuple[float, float]:
    """Return what an attention layer's cached keys and values are multiplied by; 1 unless the cache is float8."""
    if layer.kv_cache.element_size() > 1:
        return 1.0, 1.0
    return float(layer._k_scale_float), float(layer._v_scale_float)


def head_scales(layer: Any) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Return the same for each KV head, two float32 ``[Hkv]`` on the layer's device, or None twice.

    vLLM's GPU backends read these tensors: with one element for all heads, or one for each (``attn_head`` in the
    checkpoint's config). Its CPU backend has one number for all heads, and knows no other.
    """
    cache = layer.kv_cache
    if cache.element_size() > 1 or cache.device.type == "cpu":
        return None, None
    return by_head(layer._k_scale, layer), by_head(layer._v_scale, layer)


def by_head(scale: Tensor, layer: Any) -> Tensor:
    """Show a scale of all KV heads, or of each, as ``[Hkv]``; it stays in its memory, which a CUDA graph may read."""
    return scale.flatten().expand(layer.num_kv_heads)


def find_layout(layer: Any) -> PageLayout:
    """Return the layout of an attention layer's cache, by writing a few tokens with vLLM and reading them back.

    So is found which float8 it holds (``nld_float8_dtype`` of the layer): vLLM's Triton backend takes ``fp8_e5m2``,
    and writes e4m3.

    Args:
        layer: ``vllm.model_executor.layers.attention.Attention`` whose cache is bound; the cache is not touched.

    Raises:
        NLDError: no known layout reads back what was written.
    """
    cache, kv_heads, head_dim = layer.kv_cache, layer.num_kv_heads, layer.head_size
    for layout in LAYOUTS:
        if not layout.accepts(cache.shape, head_dim):
            continue
        shape = list(cache.shape)
        shape[layout.page_dim] = _PROBE_PAGES
        scratch = cache.new_zeros(shape)
        size = page_size(layout.split(scratch, head_dim)[0])
        tokens = size + 1
        stored = _numbers(2 * tokens * kv_heads * head_dim, layer).view(2, tokens, kv_heads, head_dim)
        pages = torch.tensor([[2, 1]], device=cache.device)
        slots = (pages[0, :, None] * size + torch.arange(size, device=cache.device)).flatten()[:tokens]
        layer.impl.do_kv_cache_update(layer, *_before_scaling(stored, layer), scratch, slots)
        for dtype in _dtypes(layer):
            read = layout.gather(scratch.view(dtype), head_dim, pages, tokens)
            found = torch.stack([part[0].transpose(0, 1).float() for part in read])
            tolerance = _FLOAT8_STEP if dtype.itemsize == 1 else 0.0
            if found.shape == stored.shape and torch.allclose(found, stored.float(), rtol=tolerance, atol=0):
                if dtype.itemsize == 1:
                    layer.nld_float8_dtype = dtype
                return layout
    raise NLDError(
        f"attention backend {layer.attn_backend.get_name()} stores KV pages of shape {list(cache.shape)} in an unknown "
        f"layout; known: {'; '.join(layout.name for layout in LAYOUTS)}"
    )


def _numbers(count: int, layer: Any) -> Tensor:
    """Return different numbers, as far as there are some, that every dtype of a cache holds exactly."""
    cache = layer.kv_cache
    numbers = torch.arange(count, device=cache.device)
    return (numbers % 17 - 8).float() if cache.element_size() == 1 else (numbers % 251).to(cache.dtype)


def _before_scaling(stored: Tensor, layer: Any) -> tuple[Tensor, Tensor]:
    """Return keys and values of which ``stored`` remains in the cache, whose writer divides by the layer's scales.

    Numbers without regard to the scales would not do: a calibrated one makes ordinary values fill float8's range, and
    may be so small that it cuts 8 off.
    """
    if layer.kv_cache.element_size() > 1:
        return stored[0], stored[1]
    by_heads = head_scales(layer)
    if by_heads[0] is None:
        factors: list[float | Tensor] = list(scales(layer))
    else:
        factors = [scale[:, None] for scale in by_heads]
    keys, values = ((part * factor).to(layer.dtype) for part, factor in zip(stored, factors, strict=True))
    return keys, values


def _dtypes(layer: Any) -> list[torch.dtype]:
    """Return as what a layer's cache may be read, the one that its option names first."""
    if layer.kv_cache.element_size() > 1:
        return [layer.kv_cache.dtype]
    return sorted((torch.float8_e4m3fn, torch.float8_e5m2), key=lambda dtype: dtype != float8_dtype(layer))
