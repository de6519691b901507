"""The operators in C++ for the CPU (``csrc/cpu``), loaded from the compiled library; see ``vllm_nld/ops``."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from vllm_nld.ops import OPERATORS, fake_accept_prefix, fake_best_tokens, native_library


@cache
def _load() -> str | None:
    """Load the library once; returns why that failed, or None."""
    path = native_library()
    if path is None:
        return "it was not compiled at installation (no C++ compiler, or torch was not installed before)"
    load: Any = torch.ops.load_library
    try:
        load(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    try:
        _register_fakes()
    except RuntimeError:  # an operator is missing
        return f"{path} was compiled for another version of vllm-nld; install vllm-nld again"
    return None


def _register_fakes() -> None:
    """Tell torch.compile what the operators return; what they write is in their schemas."""
    register: Any = torch.library.register_fake
    register("vllm_nld_cpu::block_attention", lambda *_: None)
    register("vllm_nld_cpu::move_kv", lambda *_: None)
    register("vllm_nld_cpu::accept_prefix", fake_accept_prefix)
    register("vllm_nld_cpu::best_tokens", fake_best_tokens)


def unavailable(device: torch.device) -> str | None:
    """Return why these operators cannot be used, or None if they can."""
    return f"it serves cpu, not {device.type}" if device.type != "cpu" else _load()


def instruction_set(force: str = "") -> str:
    """Return the instruction set that the operators use for bfloat16; ``force`` picks one by name, "" the best.

    Raises:
        RuntimeError: this machine lacks it, or the operators are unavailable. Names: avx512bf16, avx512, avx2,
            portable.
    """
    reason = _load()
    if reason is not None:
        raise RuntimeError(reason)
    name: str = torch.ops.vllm_nld_cpu.instruction_set(force)
    return name


def __getattr__(name: str) -> Any:
    if name in OPERATORS and _load() is None:
        return getattr(torch.ops.vllm_nld_cpu, name).default
    raise AttributeError(name)
