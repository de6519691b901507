"""The operators in C++ for the CPU (``csrc/cpu``), loaded from the compiled library; see ``vllm_nld/ops.py``."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from vllm_nld.ops import native_library


@cache
def _load() -> str | None:
    """Load the library once; returns why that failed, or None."""
    path = native_library()
    if path is None:
        return "it was not compiled at installation (no C++ compiler, or torch was not installed before)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    _register_fakes()
    return None


def _register_fakes() -> None:
    """Tell torch.compile what the operators return; what they write is in their schemas."""

    @torch.library.register_fake("vllm_nld_cpu::block_attention")
    def _(*_: Any) -> None:
        return None

    @torch.library.register_fake("vllm_nld_cpu::move_kv")
    def _(*_: Any) -> None:
        return None

    @torch.library.register_fake("vllm_nld_cpu::accept_prefix")
    def _(drafts: Tensor, targets: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = starts.shape[0] - 1
        return (
            starts.new_empty(rows),
            targets.new_empty(targets.shape[0]),
            starts.new_empty(rows + 1),
            targets.new_empty(rows),
        )


def unavailable(device: torch.device) -> str | None:
    """Return why these operators cannot be used, or None if they can."""
    return f"it serves cpu, not {device.type}" if device.type != "cpu" else _load()


def instruction_set(force: str = "") -> str:
    """Return the instruction set that bfloat16 attention uses; ``force`` picks one by name, "" the best.

    Raises:
        RuntimeError: this machine lacks it. Names: avx512bf16, avx512, avx2, portable.
    """
    name: str = torch.ops.vllm_nld_cpu.instruction_set(force)
    return name


def __getattr__(name: str) -> Any:
    if name in ("block_attention", "accept_prefix", "move_kv") and _load() is None:
        return getattr(torch.ops.vllm_nld_cpu, name).default
    raise AttributeError(name)
