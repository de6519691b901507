"""Triton as on an NVIDIA GPU, without one: what it would compile, and whether that compiles.

A launch goes through Triton's own ``JITFunction.run`` up to the kernel, on tensors of the CPU: its types, its
specialization, its cache. Nothing runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import pytest

_devices = count(1000)


@dataclass(frozen=True)
class Compilation:
    """A variant of a kernel that Triton had not compiled before.

    Attributes:
        kernel: its function's name.
        key: Triton's, of types, specializations, constants and options.
        binary: the compiled kernel, if it was to be compiled.
    """

    kernel: str
    key: str
    binary: Any = None


class _Driver:
    """The few questions that Triton asks its driver before a launch."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)
        self._device = next(_devices)  # a device of its own has a cache of its own

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def pretended_gpu(capability: int = 90, compiling: bool = False) -> Iterator[list[Compilation]]:
    """Let launches go to a GPU that is not there; yields what was compiled since, as it grows.

    Args:
        capability: compute capability, major and minor digits.
        compiling: compile, down to a binary. Otherwise only the keys are found.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from vllm_nld.ops import triton_ops

    compiled: list[Compilation] = []
    run, compile_kernel = JITFunction.run, JITFunction._do_compile

    def launch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    def record(self: Any, key: str, signature: Any, device: Any, *rest: Any) -> Any:
        binary = compile_kernel(self, key, signature, device, *rest) if compiling else None
        compiled.append(Compilation(self.fn.__name__, key, binary))
        # Triton takes None for a kernel that is not there.
        self.device_caches[device][0][key] = binary or object()
        return binary

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", launch)
        patch.setattr(JITFunction, "_do_compile", record)
        patch.setattr(triton_ops, "_processors", lambda device: 132)
        patch.setattr(driver, "_active", _Driver(capability))
        yield compiled
