"""A float8 KV cache as vLLM's backends for GPUs write it, found and read by the draft pass on the CPU.

The layers stand in for vLLM's: with a scale for all heads or one for each, and with queries that vLLM has rounded.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.config import CacheConfig

from vllm_nld.attention import backend, layout
from vllm_nld.attention.backend import DraftMetadata, block_attention_backend, block_forward
from vllm_nld.attention.layout import find_layout, typed_cache
from vllm_nld.errors import NLDError
from vllm_nld.ops import BIDIRECTIONAL
from vllm_nld.ops.pages import STRIDED

HEADS, KV_HEADS, DIM, SIZE, PAGES = 6, 3, 32, 16, 4
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SCALES = {
    "none": (torch.tensor(1.0), torch.tensor(1.0)),
    "calibrated": (torch.tensor(0.043), torch.tensor([0.0021])),
    "by head": (torch.tensor([0.04, 0.11, 0.02]), torch.tensor([0.002, 0.006, 0.03])),
}


class Layer:
    """An attention layer of vLLM's FlashAttention: keys next to values, divided by their scales."""

    def __init__(self, scales: tuple[Tensor, Tensor], named: str = "fp8", written: torch.dtype = E4M3) -> None:
        self.kv_cache = torch.zeros(PAGES, KV_HEADS, SIZE, 2 * DIM, dtype=torch.uint8)
        self.kv_cache_dtype, self.dtype, self.head_size = named, torch.bfloat16, DIM
        self.num_heads, self.num_kv_heads = HEADS, KV_HEADS
        self._k_scale, self._v_scale = scales
        self._k_scale_float, self._v_scale_float = (scale.max().item() for scale in scales)
        self._q_scale = torch.tensor([0.01, 0.02, 0.005]) if scales[0].numel() > 1 else torch.tensor(0.01)
        self.written, self.impl = written, self
        self.attn_backend = SimpleNamespace(get_name=lambda: "FLASH_ATTN")

    def do_kv_cache_update(self, layer: object, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
        for part, x, scale in ((0, key, self._k_scale), (DIM, value, self._v_scale)):
            stored = (x.float() / scale.flatten().expand(KV_HEADS)[:, None]).clamp(-448, 448).to(self.written)
            for token, slot in enumerate(slots.tolist()):
                cache[slot // SIZE, :, slot % SIZE, part : part + DIM] = stored[token].view(torch.uint8)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """There, scales are tensors on the device; and PyTorch's operator reads them here."""

    def head_scales(layer: Any) -> tuple[Tensor, Tensor]:
        return layout.by_head(layer._k_scale, layer), layout.by_head(layer._v_scale, layer)

    monkeypatch.setattr(layout, "head_scales", head_scales)
    monkeypatch.setattr(backend, "head_scales", head_scales)
    monkeypatch.setenv("VLLM_NLD_OPS", "torch")
    for cached in (backend.ops.implementation, backend.ops.function):
        monkeypatch.setattr(backend.ops, cached.__name__, cached.__wrapped__)


@pytest.mark.parametrize(("named", "written"), [("fp8", E4M3), ("fp8_e5m2", E5M2), ("fp8_e5m2", E4M3)])
@pytest.mark.parametrize("scales", SCALES)
def test_layout_and_float8_are_found(scales: str, named: str, written: torch.dtype) -> None:
    """A calibrated scale brings the largest value of a model to float8's largest: 8 may be far beyond.

    vLLM's Triton backend takes fp8_e5m2, and writes e4m3.
    """
    layer = Layer(SCALES[scales], named, written)
    assert find_layout(layer) is STRIDED[2]
    assert typed_cache(layer).dtype == written
    assert not layer.kv_cache.any(), "the layer's own cache must not be written"


def test_a_writer_without_scales_is_refused() -> None:
    layer = Layer(SCALES["calibrated"])
    layer.do_kv_cache_update = lambda _, *arguments: Layer(SCALES["none"]).do_kv_cache_update(None, *arguments)  # type: ignore[method-assign]
    with pytest.raises(NLDError, match="unknown layout"):
        find_layout(layer)


def attend(layer: Layer, query: Tensor, key: Tensor, value: Tensor, cached: int) -> Tensor:
    """One draft block after ``cached`` tokens in pages 3, 0, ..., in bfloat16."""
    ints = [torch.tensor(x, dtype=torch.int32) for x in ([[3, 0, 2]], [cached], [0, len(query)], [BIDIRECTIONAL])]
    blocks = DraftMetadata(*ints, max_length=len(query), max_prefix=cached)
    output = torch.full((len(query), HEADS, DIM), torch.nan, dtype=torch.bfloat16)
    return block_forward(layer, DIM**-0.5, query, key, value, blocks, output)


@pytest.mark.parametrize("rounded", [False, True], ids=["plain query", "float8 query"])
@pytest.mark.parametrize("scales", ["calibrated", "by head"])
def test_draft_equals_dense_attention_over_dequantized_pages(scales: str, rounded: bool) -> None:
    layer = Layer(SCALES[scales])
    generator = torch.Generator().manual_seed(0)
    cached, fresh = SIZE + 5, 4
    sizes = torch.stack([scale.flatten().expand(KV_HEADS) for scale in SCALES[scales]])[:, None, :, None] * 100
    keys, values = torch.randn(2, cached + fresh, KV_HEADS, DIM, generator=generator).mul(sizes).bfloat16()
    slots = [(3, 0, 2)[token // SIZE] * SIZE + token % SIZE for token in range(cached)]
    layer.do_kv_cache_update(layer, keys[:cached], values[:cached], layer.kv_cache, torch.tensor(slots))
    query = torch.randn(fresh, HEADS, DIM, generator=generator).bfloat16()
    q_scale = layer._q_scale.flatten().expand(KV_HEADS).repeat_interleave(HEADS // KV_HEADS)[:, None]
    given = query
    if rounded:
        given = (query.float() / q_scale).to(E4M3)
        query = (given.float() * q_scale).bfloat16()
    found = attend(layer, given, keys[cached:], values[cached:], cached)

    def dequantized(x: Tensor, scale: Tensor) -> Tensor:
        scale = scale.flatten().expand(KV_HEADS)[:, None]
        return torch.cat(((x[:cached].float() / scale).to(E4M3).double() * scale, x[cached:].double()))

    k, v = dequantized(keys, layer._k_scale), dequantized(values, layer._v_scale)
    group = HEADS // KV_HEADS
    scores = torch.einsum("lhd,nhd->hln", query.double(), k.repeat_interleave(group, 1)) * DIM**-0.5
    expected = torch.einsum("hln,nhd->lhd", scores.softmax(-1), v.repeat_interleave(group, 1))
    per_head = expected.abs().amax((0, 2)).clamp(min=1e-9)[:, None]
    assert ((found.double() - expected).abs() / per_head).max() < 0.03


@pytest.mark.parametrize(
    ("cache_dtype", "strategy", "asked"),
    [
        ("auto", None, "auto"),
        ("auto", "tensor", "fp8"),
        ("auto", "attn_head", "fp8"),
        ("bfloat16", "tensor", "bfloat16"),
        ("bfloat16", "attn_head", "bfloat16"),  # the user overrules the checkpoint
    ],
)
def test_backend_is_chosen_for_the_cache_of_the_checkpoint(
    monkeypatch: pytest.MonkeyPatch, cache_dtype: Any, strategy: str | None, asked: str
) -> None:
    """vLLM's layer would turn "auto" into float8 after the choice, which may have been a backend that has none."""
    calls: list[tuple[Any, ...]] = []

    def choose(head_size: int, dtype: torch.dtype, kind: str, use_per_head_quant_scales: bool = False) -> Any:
        calls.append((kind, use_per_head_quant_scales))
        return SimpleNamespace(forward_includes_kv_cache_update=False)

    monkeypatch.setattr(backend, "get_attn_backend", choose)
    monkeypatch.setattr(backend, "_with_draft_passes", lambda chosen: chosen)
    scheme = None if strategy is None else {"strategy": strategy}
    block_attention_backend(64, CacheConfig(cache_dtype=cache_dtype), SimpleNamespace(kv_cache_scheme=scheme))
    assert calls == [(asked, strategy == "attn_head" and asked == "fp8")]
