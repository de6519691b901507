"""Triton as on an NVIDIA GPU, without one: what it would compile, and whether that works.

A launch goes through Triton's own ``JITFunction.run`` up to the kernel, on CPU tensors: types, specialization, cache.
Nothing runs.
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
        key: Triton's key, made of types, specializations, constants and options.
        binary: the compiled kernel, if it was to be compiled.
    """

    kernel: str
    key: str
    binary: Any = None


class _Driver:
    """The calls that Triton makes to its driver before a launch."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)
        self._device = next(_devices)  # a separate device has a separate cache

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def pretended_gpu(capability: int = 90, compiling: bool = False) -> Iterator[list[Compilation]]:
    """Send launches to a GPU that does not exist; yields the growing list of compiled variants.

    Args:
        capability: compute capability, major and minor digits.
        compiling: compile down to a binary. Otherwise only find the keys.
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
        # Triton uses None for a missing kernel.
        self.device_caches[device][0][key] = binary or object()
        return binary

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", launch)
        patch.setattr(JITFunction, "_do_compile", record)
        patch.setattr(triton_ops, "_processors", lambda device: 132)
        patch.setattr(driver, "_active", _Driver(capability))
        yield compiled
