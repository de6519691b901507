"""FlashAttention's implementation at the released models' head size, the only one that every build of vLLM has."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.kernels import cases
from vllm_nld.ops import flash_ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("name", [name for name, spec in cases.EDGE_SPECS.items() if spec.head_dim <= 128])
def test_edge_cases_equal_float64(name: str) -> None:
    reason = flash_ops.unavailable(torch.device("cuda"))
    if reason:
        pytest.skip(reason)
    spec = dataclasses.replace(cases.EDGE_SPECS[name], head_dim=128)
    cases.check(flash_ops.IMPLEMENTATION, spec, torch.bfloat16, "cuda")
