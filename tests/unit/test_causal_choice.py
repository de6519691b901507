"""Whether the operator or vLLM's attention computes a causal step, on every kind of CPU, all simulated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.platforms import CpuArchEnum, current_platform
from vllm.v1.attention.backends import cpu_attn  # before any simulation, because it loads vLLM's build for this CPU

from tests.support.cpus import write_columns, write_tiles
from vllm_nld import ops
from vllm_nld.attention import backend
from vllm_nld.ops import cpp_ops, torch_ops
from vllm_nld.ops.pages import STRIDED, TILED

HEAD_DIM, PAGE_SIZE = 64, 128


@dataclass(frozen=True)
class Kind:
    """A kind of CPU: what the operator library and PyTorch report, and what computes bfloat16 causal steps."""

    instruction_set: str
    amx: bool
    operator: bool


KINDS = {
    "Zen 5": Kind("avx512bf16", amx=False, operator=True),
    "Intel without AMX": Kind("avx512", amx=False, operator=True),
    "Intel with AMX": Kind("avx512", amx=True, operator=False),
    "Zen 3": Kind("avx2", amx=False, operator=False),
    "another": Kind("portable", amx=False, operator=False),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kind]:
    """Simulate such a CPU."""
    kind = KINDS[request.param]
    monkeypatch.setattr(ops, "implementation", lambda *_: cpp_ops.IMPLEMENTATION)
    monkeypatch.setattr(cpp_ops, "instruction_set", lambda force="": kind.instruction_set)
    monkeypatch.setattr(type(current_platform), "get_cpu_architecture", lambda *_: CpuArchEnum.X86)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: kind.amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: kind.instruction_set.startswith("avx512"))
    backend.fast_causal.cache_clear()
    yield kind
    backend.fast_causal.cache_clear()


class Layer:
    """An attention layer with the pages that vLLM chooses on this CPU."""

    def __init__(self, dtype: torch.dtype, cache: str = "auto") -> None:
        isa = cpu_attn._get_attn_isa(dtype, PAGE_SIZE, HEAD_DIM, *([] if cache == "auto" else [cache]))
        self._write = write_tiles if isa == "amx" else write_columns
        stored = torch.uint8 if cache == "fp8" else dtype
        self.kv_cache = torch.zeros(4, 2, PAGE_SIZE, 2 * HEAD_DIM).to(stored)
        self.dtype, self.num_kv_heads, self.head_size, self.kv_cache_dtype = dtype, 2, HEAD_DIM, cache
        self._k_scale_float = self._v_scale_float = 1.0
        self.impl, self.attn_backend = self, SimpleNamespace(get_name=lambda: "CPU_ATTN")

    def do_kv_cache_update(self, layer: object, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
        self._write(key, value, cache, slots)


def step(longest: int = 9, causal: bool = True) -> Any:
    """vLLM's metadata of a step with a row of ``longest`` tokens and one of a single token."""
    lengths = torch.tensor([longest, 1])
    return SimpleNamespace(
        max_query_len=longest,
        max_seq_len=200,
        causal=causal,
        query_start_loc=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        seq_lens=torch.tensor([200, 40]),
        block_table=torch.zeros(2, 2, dtype=torch.int64),
    )


def takes_operator(layer: Layer, metadata: Any) -> bool:
    return backend.verify_blocks(metadata, torch.zeros(10, 4, HEAD_DIM, dtype=layer.dtype), layer) is not None


def test_bfloat16_steps_of_several_tokens_use_the_operator(kind: Kind) -> None:
    """The operator if it multiplies fast, except with AMX, where vLLM's attention is faster."""
    layer = Layer(torch.bfloat16)
    assert backend.page_layout(layer) is (TILED if kind.amx else STRIDED[0])
    assert takes_operator(layer, step()) == kind.operator


def test_other_steps_stay_with_vllm(kind: Kind) -> None:
    assert not takes_operator(Layer(torch.bfloat16), step(longest=1))
    assert not takes_operator(Layer(torch.bfloat16), step(causal=False))
    for dtype in (torch.float32, torch.float16):
        assert not takes_operator(Layer(dtype), step())


def test_steps_over_a_float8_cache_stay_with_vllm(kind: Kind) -> None:
    if not kind.instruction_set.startswith("avx512"):
        with pytest.raises(NotImplementedError, match="AVX-512"):
            Layer(torch.bfloat16, "fp8")
    else:
        assert not takes_operator(Layer(torch.bfloat16, "fp8"), step())


def test_only_cpp_operators_run_causal_steps(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "implementation", lambda *_: torch_ops.IMPLEMENTATION)
    assert not takes_operator(Layer(torch.bfloat16), step())
