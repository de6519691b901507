"""A whole engine with a float8 KV cache on any CPU: vLLM's own needs AVX-512, and knows one scale for all heads.

The stand-in behaves as FlashAttention does on Hopper: it divides by a scale for each head, rounds queries to float8
first, and attends to the fresh tokens by their rounded keys and values, as AR does.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_nld.attention import backend, layout
from vllm_nld.attention.layout import by_head

FLOAT8 = torch.float8_e4m3fn


def head_scales(layer: Any) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """What ``layout.head_scales`` returns on a GPU."""
    if layer.kv_cache.element_size() > 1:
        return None, None
    return by_head(layer._k_scale, layer), by_head(layer._v_scale, layer)


def write(self: Any, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write keys next to values, each divided by its scale; slots of -1 are padding."""
    dim, size = key.shape[2], kv_cache.shape[2]
    used = slot_mapping >= 0
    pages, places = slot_mapping[used] // size, slot_mapping[used] % size
    pairs = zip((key, value), head_scales(layer), (slice(dim), slice(dim, None)), strict=True)
    for x, scale, where in pairs:
        stored = (x[: len(used)][used].float() / scale[:, None]).clamp(-448, 448).to(FLOAT8)
        kv_cache[pages, :, places, where] = stored.view(torch.uint8)


def forward(
    self: Any, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any,
    output: Tensor, *_: Any, **__: Any,
) -> Tensor:  # fmt: skip
    """Attend causally to what is in the cache, row by row."""
    if attn_metadata is None:
        return output
    assert query.dtype == FLOAT8, "vLLM rounds queries for a backend that multiplies float8"
    dim, size, group = query.shape[2], kv_cache.shape[2], self.num_heads // self.num_kv_heads
    starts = attn_metadata.query_start_loc.tolist()
    q_scale = by_head(layer._q_scale, layer).repeat_interleave(group)[:, None]
    for row, length in enumerate(attn_metadata.seq_lens.tolist()):
        mine = slice(starts[row], starts[row + 1])
        pages = kv_cache[attn_metadata.block_table[row, : -(-length // size)].long()].view(FLOAT8)
        both = pages.transpose(1, 2).flatten(0, 1)[:length].float()  # [length, Hkv, 2 D]
        keys, values = (
            (part * scale[:, None]).repeat_interleave(group, 1)
            for part, scale in zip(both.split(dim, -1), head_scales(layer), strict=True)
        )
        scores = torch.einsum("lhd,nhd->hln", query[mine].float() * q_scale, keys) * self.scale
        seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(length - scores.shape[1])
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        output[mine] = torch.einsum("hln,nhd->lhd", weights, values).to(output.dtype)
    return output


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let vLLM's CPU backend be the stand-in, and the draft pass read scales as on a GPU, with PyTorch's operator."""
    from vllm.v1.attention.backends import cpu_attn

    impl = cpu_attn.CPUAttentionBackendImpl
    monkeypatch.setattr(impl, "do_kv_cache_update", write)
    monkeypatch.setattr(impl, "forward", forward)
    monkeypatch.setattr(impl, "supports_quant_query_input", True)
    monkeypatch.setattr(cpu_attn, "_get_attn_isa", lambda *_, **__: "vec")
    monkeypatch.setattr(cpu_attn.ops, "cpu_attn_get_scheduler_metadata", lambda **_: torch.zeros(1))
    monkeypatch.setattr(layout, "head_scales", head_scales)
    monkeypatch.setattr(backend, "head_scales", head_scales)
    monkeypatch.setenv("VLLM_NLD_OPS", "torch")
    for cached in (backend.ops.implementation, backend.ops.function):
        monkeypatch.setattr(backend.ops, cached.__name__, cached.__wrapped__)
