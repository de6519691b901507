"""Features of this CPU, as vLLM checks them; tests state needs with these. Kinds of CPU: docs/developer/operators.md"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


def has_amx() -> bool:
    """Whether vLLM uses AMX, for bfloat16 attention, whose pages are then tiles, and for int8 products."""
    return bool(torch.cpu._is_amx_tile_supported())


def vllm_writes_tiles() -> bool:
    """Whether the build of vLLM that this CPU loads can write pages in tiles, which needs AVX-512 but not AMX."""
    from vllm import _custom_ops as vllm_ops
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    cache = torch.zeros(1, 1, 64, 32, dtype=torch.bfloat16)
    keys, values = cache.chunk(2, dim=2)
    token = torch.ones(1, 1, 32, dtype=torch.bfloat16)
    try:
        vllm_ops.cpu_attn_reshape_and_cache(token, token, keys, values, torch.tensor([0]), "amx")
    except RuntimeError:
        return False
    return True


def has_float8_cache() -> bool:
    """Whether vLLM's attention on this machine, on its GPU if it has one, reads float8 caches."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_capability() >= (8, 9)
    return has_amx() or torch.cpu._is_avx512_supported()


needs_float8_cache = pytest.mark.skipif(
    not has_float8_cache(),
    reason="vLLM's float8 cache needs AVX-512 or AMX on a CPU, compute capability 8.9 on a GPU",
)
needs_float32_int8 = pytest.mark.skipif(has_amx(), reason="with AMX, vLLM's int8 products take no float32")


def write_tiles(key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Write as vLLM does with AMX: keys in tiles of 16 tokens by 2 dimensions, values of 2 by 16.

    Args:
        key: ``[tokens, kv_heads, head_dim]``, and so is ``value``.
        cache: ``[pages, kv_heads, page_size, 2 * head_dim]``.
        slots: int64 ``[tokens]``.
    """
    pages, heads, size, width = cache.shape
    head_dim = width // 2
    page, token, part = slots[:, None] // size, slots[:, None] % size, torch.arange(head_dim)
    key_at = (token // 16 * (head_dim // 2) + part // 2) * 32 + token % 16 * 2 + part % 2
    value_at = (part // 16 * (size // 2) + token // 2) * 32 + part % 16 * 2 + token % 2 + size * head_dim
    flat = cache.view(pages, heads, -1)
    for head in range(heads):
        flat[page, head, key_at] = key[: len(slots), head]
        flat[page, head, value_at] = value[: len(slots), head]


def write_columns(key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Write as vLLM does on other x86 CPUs: a key page ``[head_dim, page_size]``, then a value page by rows."""
    pages, heads, size, width = cache.shape
    head_dim = width // 2
    page, token, part = slots[:, None] // size, slots[:, None] % size, torch.arange(head_dim)
    flat = cache.view(pages, heads, -1)
    for head in range(heads):
        flat[page, head, part * size + token] = key[: len(slots), head]
        flat[page, head, (size + token) * head_dim + part] = value[: len(slots), head]
