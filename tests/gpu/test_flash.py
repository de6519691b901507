"""FlashAttention's implementation at the released models' head size, the only one that every build of vLLM has."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.kernels import cases
from vllm_nld.ops import flash_ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


SPECS = cases.EDGE_SPECS | cases.HEAD_SCALE_SPECS


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if spec.head_dim <= 128])
def test_edge_cases_equal_float64(name: str) -> None:
    reason = flash_ops.unavailable(torch.device("cuda"))
    if reason:
        pytest.skip(reason)
    spec = dataclasses.replace(SPECS[name], head_dim=128)
    cases.check(flash_ops.IMPLEMENTATION, spec, torch.bfloat16, "cuda")


@pytest.mark.parametrize("name", ["float8 e4m3", "e4m3 by head"])
def test_float8_queries_equal_float64(name: str) -> None:
    """FlashAttention rounds its weights to float8 as well, which have 3 bits of mantissa."""
    reason = flash_ops.unavailable(torch.device("cuda"))
    if reason or torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip(reason or "FlashAttention multiplies float8 on Hopper and Blackwell")
    spec = dataclasses.replace(SPECS[name], head_dim=128)
    call = cases.with_float8_query(cases.attention_arguments(spec, torch.bfloat16))
    expected = cases.oracle(call)
    call = cases.on_device(call, "cuda")
    flash_ops.block_attention(call)
    used = sum(spec.lengths)
    error = (call.output[:used].double().cpu() - expected[:used]).abs().max()
    assert error <= 2**-4 * expected[:used].abs().max()
