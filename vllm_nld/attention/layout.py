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


def typed_cache(layer: Any) -> Tensor:
    """Return an attention layer's cache; vLLM keeps float8 as bytes, here they get their dtype."""
    cache: Tensor = layer.kv_cache
    if cache.dtype != torch.uint8:
        return cache
    return cache.view(torch.float8_e5m2 if layer.kv_cache_dtype == "fp8_e5m2" else torch.float8_e4m3fn)


def scales(layer: Any) -> tuple[float, float]:
    """Return what an attention layer's cached keys and values are multiplied by; 1 unless the cache is float8."""
    if layer.kv_cache.element_size() > 1:
        return 1.0, 1.0
    return float(layer._k_scale_float), float(layer._v_scale_float)


def find_layout(layer: Any) -> PageLayout:
    """Return the layout of an attention layer's cache, by writing a few tokens with vLLM and reading them back.

    Args:
        layer: ``vllm.model_executor.layers.attention.Attention`` whose cache is bound; the cache is not touched.

    Raises:
        NLDError: no known layout reads back what was written.
    """
    cache = typed_cache(layer)
    kv_heads, head_dim = layer.num_kv_heads, layer.head_size
    quantized = cache.element_size() == 1
    for layout in LAYOUTS:
        if not layout.accepts(cache.shape, head_dim):
            continue
        shape = list(cache.shape)
        shape[layout.page_dim] = _PROBE_PAGES
        scratch = layer.kv_cache.new_zeros(shape)
        size = page_size(layout.split(scratch, head_dim)[0])
        tokens = size + 1
        written = torch.arange(2 * tokens * kv_heads * head_dim, device=cache.device)
        written = written % 17 - 8 if quantized else written % 251  # exact in every dtype
        written = written.to(layer.dtype if quantized else cache.dtype).view(2, tokens, kv_heads, head_dim)
        pages = torch.tensor([[2, 1]], device=cache.device)
        slots = (pages[0, :, None] * size + torch.arange(size, device=cache.device)).flatten()[:tokens]
        layer.impl.do_kv_cache_update(layer, written[0], written[1], scratch, slots)
        read = layout.gather(scratch.view(cache.dtype), head_dim, pages, tokens)
        scaled = [part[0].transpose(0, 1).float() * scale for part, scale in zip(read, scales(layer), strict=True)]
        # A scale that is not a power of two rounds what is stored.
        tolerance = 0.15 if quantized else 0.0
        found = torch.stack(scaled)
        if found.shape == written.shape and torch.allclose(found, written.float(), rtol=tolerance, atol=0):
            return layout
    raise NLDError(
        f"attention backend {layer.attn_backend.get_name()} stores KV pages of shape {list(cache.shape)} in an unknown "
        f"layout; known: {'; '.join(layout.name for layout in LAYOUTS)}"
    )
