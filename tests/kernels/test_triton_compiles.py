"""The Triton kernels, compiled for several GPUs with Triton's own compiler and ptxas, without a device.

The interpreter shows what the kernels compute; only this shows that Triton accepts them, and that they fit.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.kernels import cases
from tests.kernels.implementations import INTERPRETING
from vllm_nld.ops import triton_ops

pytestmark = [
    pytest.mark.skipif(INTERPRETING, reason="nothing is compiled for the interpreter"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
]

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Shared memory that one program may have, by compute capability: A100, H100, B200."""

# Large float32 tiles take half a minute each to compile. They also fit (tried once by hand).
SMALL = cases.AttentionSpec((5, 0), (4, 3), (0, 1), heads=(1, 1), head_dim=32)
ATTENTION = {
    "bfloat16, heads of 128": (cases.EDGE_SPECS["whole pages"], torch.bfloat16),
    "split": (cases.EDGE_SPECS["one long row"], torch.bfloat16),
    "float32": (SMALL, torch.float32),
    "float8 e4m3": (cases.EDGE_SPECS["float8 e4m3"], torch.bfloat16),
    "float8 e5m2 by head": (cases.HEAD_SCALE_SPECS["e5m2 by head"], torch.float16),
}


class _Device:
    """Replaces Triton's driver. Its device number is the compute capability, because Triton caches by number."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


class _Kernel:
    """A kernel whose launches only compile."""

    def __init__(self, kernel: Any, compiled: list[Any]) -> None:
        self.kernel = kernel
        self.compiled = compiled

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            if "UPCAST" in options:  # for the interpreter
                options["UPCAST"] = False
            self.compiled.append(self.kernel.run(*args, grid=grid, warmup=True, **options))

        return launch


class _Kernels:
    def __init__(self) -> None:
        self.compiled: list[Any] = []

    def __getattr__(self, name: str) -> _Kernel:
        from vllm_nld.ops import triton_kernels

        return _Kernel(getattr(triton_kernels, name), self.compiled)


@pytest.fixture
def capability() -> int:
    return 90


@pytest.fixture
def compiled(capability: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The compiled kernels of the operators' launches; checked when the test ends."""
    from triton.runtime.driver import driver

    kernels = _Kernels()
    monkeypatch.setattr(driver, "_active", _Device(capability))
    monkeypatch.setattr(triton_ops, "_kernels", lambda: kernels)
    monkeypatch.setattr(triton_ops, "_processors", lambda device: 132)
    yield kernels.compiled
    assert kernels.compiled, "nothing was launched"
    for kernel in kernels.compiled:
        assert kernel.asm["cubin"]
        shared, limit = kernel.metadata.shared, SHARED_BYTES[capability]
        assert shared <= limit, f"{kernel.metadata.name} wants {shared} bytes of shared memory, {limit} are there"


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(compiled: list[Any], name: str) -> None:
    spec, dtype = ATTENTION[name]
    triton_ops.block_attention(cases.attention_arguments(spec, dtype))
    names = {kernel.metadata.name for kernel in compiled}
    assert "attention_kernel" in names
    assert name != "split" or "merge_kernel" in names


@pytest.mark.parametrize("capability", [80, 100], ids="sm_{}".format)
def test_attention_compiles_for_other_architectures(compiled: list[Any], capability: int) -> None:
    spec, dtype = ATTENTION["split"]
    triton_ops.block_attention(cases.attention_arguments(spec, dtype))


def test_accept_prefix(compiled: list[Any]) -> None:
    starts = torch.tensor([0, 2, 5], dtype=torch.int32)
    triton_ops.accept_prefix(torch.arange(5), torch.arange(7), starts)
    assert {kernel.metadata.name for kernel in compiled} == {"count_kernel", "pack_kernel"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_best_tokens(compiled: list[Any], dtype: torch.dtype) -> None:
    triton_ops.best_tokens(torch.zeros(3, 131072, dtype=dtype))


@pytest.mark.parametrize("capability", SHARED_BYTES, ids="sm_{}".format)
def test_branches(compiled: list[Any]) -> None:
    """Those of vLLM's second runner: two rows, four branches of nine tokens each, blocks of up to 32."""
    from vllm_nld.speculator import branch_kernels as kernels

    def ints(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    def longs(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int64)

    count, length, ranks, longest = 4, 9, 4, 4096
    row, drafts, plan = ints(2), 2 * (length - 1), (ints(2, 64), ints(2, 64), 64)
    _Kernel(kernels.lay_out_kernel, compiled)[(2 * count,)](
        row, row, row, ints(3), ints(2, 256), 256, row, *plan, row, row,
        ints(72), longs(72), ints(8), torch.zeros(72, 1, dtype=torch.bfloat16), ints(8, 256), 256, ints(8), longs(4),
        count, length, longest, 3, 16, LENGTH=16, PAGES=64,
    )  # fmt: skip
    _Kernel(kernels.hit_kernel, compiled)[(2,)](
        row, row, row, row, row, row, longs(2, 1), *plan, ints(8), row, row,
        longs(drafts), longs(drafts), longs(drafts), row, row, longs(4),
        count, length, longest, 64, 1 << 30, LENGTH=16,
    )  # fmt: skip
    _Kernel(kernels.plan_kernel, compiled)[(2,)](
        row, row, row, row, longs(2, 1), row, longs(drafts), longs(drafts, ranks), torch.zeros(drafts, ranks),
        row, row, longs(2, 31), 31, row, *plan, length, count, longest, 0.5, 0.45, 0.17, 0.08,
        PLACES=16, COLUMNS=8, RANKS=ranks, STEPS=32,
    )  # fmt: skip
    assert {kernel.metadata.name for kernel in compiled} == {"lay_out_kernel", "hit_kernel", "plan_kernel"}
