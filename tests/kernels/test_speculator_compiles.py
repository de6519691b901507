"""The speculator's Triton kernels, compiled for GPUs without a device; ``tests/v2`` runs them in the interpreter."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tests.kernels.implementations import INTERPRETING
from tests.kernels.triton_compiler import pretended_gpu

pytestmark = [
    pytest.mark.skipif(INTERPRETING, reason="nothing is compiled for the interpreter"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
]

REQUESTS, BLOCK = 3, 32


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile(capability: int) -> None:
    """Also: one variant serves other numbers of requests and slots, so that nothing is compiled while serving."""
    from vllm_nld.speculator import kernels
    from vllm_nld.speculator.buffers import DraftBuffers, Shape, StepTensors

    def ints(*size: int) -> torch.Tensor:
        return torch.zeros(*size, dtype=torch.int32)

    shape = Shape(REQUESTS, BLOCK, 256, 16, 4096, 5)
    buffers = DraftBuffers(shape, torch.bfloat16, torch.device("cpu"))
    with pretended_gpu(capability, compiling=True) as compiled:
        for rows, slots in ((3, 2), (2, 1), (1, 1)):
            step = StepTensors(
                torch.zeros(rows, dtype=torch.int64), ints(rows), ints(rows),
                torch.zeros(REQUESTS, 1, dtype=torch.int64), ints(REQUESTS, 256), torch.zeros(REQUESTS),
                torch.zeros(REQUESTS, dtype=torch.int64),
            )  # fmt: skip
            tables = (ints(REQUESTS), ints(REQUESTS), ints(REQUESTS))
            buffers.fill(ints(rows), step, tables, slots, slots, BLOCK)
            buffers.hand_out(torch.zeros(slots * (BLOCK - 1), dtype=torch.int64), 0, slots, BLOCK)
            for every in (False, True):
                kernels.accept_kernel[(rows,)](
                    torch.zeros(rows, BLOCK, dtype=torch.int64), BLOCK, ints(rows), ints(rows * BLOCK),
                    torch.zeros(rows * BLOCK, dtype=torch.int64), ints(rows + 1), step.requests, ints(REQUESTS),
                    ints(REQUESTS), buffers.drafts, buffers.drafts.stride(0), EVERY=every,
                )  # fmt: skip
    names = [variant.kernel for variant in compiled]
    assert sorted(names) == ["accept_kernel", "accept_kernel", "hand_out_kernel", "prepare_kernel"]
    assert all(variant.binary is not None for variant in compiled)
