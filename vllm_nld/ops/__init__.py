"""The operators of ``docs/operators.md``, whichever implementation computes them.

One interface, several implementations: C++ (CPU), CUDA, Triton, xformers, and PyTorch as the reference. Which one
serves a device is decided once, by what is installed; ``VLLM_NLD_OPS`` forces one by name. The functions here are also
torch operators (``torch.ops.vllm_nld.*``) with fake implementations, so they may stand inside compiled code.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import vllm_nld
from vllm_nld.errors import NLDError

ENVIRONMENT_VARIABLE = "VLLM_NLD_OPS"
OPERATORS = ("block_attention", "accept_prefix", "move_kv", "best_tokens")


@dataclass(frozen=True)
class Implementation:
    """A way to compute the operators.

    Attributes:
        name: as ``VLLM_NLD_OPS`` and ``vllm-nld doctor`` call it.
        module: has the operators as functions, and ``unavailable(device) -> str | None`` unless it runs everywhere.
        devices: device types it can serve.
    """

    name: str
    module: str
    devices: tuple[str, ...]

    def load(self) -> ModuleType:
        return importlib.import_module(self.module)

    def unavailable(self, device: torch.device) -> str | None:
        """Return why it cannot serve a device, or None if it can."""
        if device.type not in self.devices:
            return f"it serves {' and '.join(self.devices)}, not {device.type}"
        try:
            reason: Callable[[torch.device], str | None] = getattr(self.load(), "unavailable", lambda _: None)
        except ImportError as error:
            return f"{error}"
        return reason(device)


IMPLEMENTATIONS = (
    Implementation("cpp", "vllm_nld.ops.cpp_ops", ("cpu",)),
    Implementation("cuda", "vllm_nld.ops.cuda_ops", ("cuda",)),
    Implementation("triton", "vllm_nld.ops.triton_ops", ("cuda",)),
    Implementation("xformers", "vllm_nld.ops.xformers_ops", ("cuda",)),
    Implementation("torch", "vllm_nld.ops.torch_ops", ("cpu", "cuda")),
)
"""In order of preference."""


@cache
def implementation(operator: str, device_type: str) -> Implementation:
    """Return what computes an operator on a device.

    Raises:
        NLDError: ``VLLM_NLD_OPS`` names an implementation that is unknown or does not run here.
    """
    device, wanted = torch.device(device_type), os.environ.get(ENVIRONMENT_VARIABLE)
    names = [candidate.name for candidate in IMPLEMENTATIONS]
    if wanted is not None and wanted not in names:
        raise NLDError(f"{ENVIRONMENT_VARIABLE}={wanted}: allowed are {', '.join(names)}")
    for candidate in IMPLEMENTATIONS:
        reason = candidate.unavailable(device)
        if candidate.name == wanted and reason is not None:
            raise NLDError(f"{ENVIRONMENT_VARIABLE}={wanted} does not run on {device_type}: {reason}")
        if reason is None and wanted in (None, candidate.name) and hasattr(candidate.load(), operator):
            return candidate
    return IMPLEMENTATIONS[-1]  # the forced one lacks this operator; PyTorch has all


@cache
def function(operator: str, device_type: str) -> Callable[..., Any]:
    """Return an operator's implementation for a device: what a caller outside compiled code should call."""
    chosen: Callable[..., Any] = getattr(implementation(operator, device_type).load(), operator)
    return chosen


@torch.library.custom_op("vllm_nld::block_attention", mutates_args=("output",))
def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    block_table: Tensor,
    prefix_lens: Tensor,
    block_starts: Tensor,
    mask_kinds: Tensor,
    mask_words: Tensor | None,
    scale: float,
    k_scale: float,
    v_scale: float,
    max_length: int,
    max_prefix: int,
    output: Tensor,
) -> None:
    """Write attention over paged prefixes and fresh blocks into ``output`` (``docs/operators.md``)."""
    function("block_attention", query.device.type)(
        query, key, value, key_pages, value_pages, block_table, prefix_lens, block_starts, mask_kinds, mask_words,
        scale, k_scale, v_scale, max_length, max_prefix, output,
    )  # fmt: skip


@torch.library.custom_op("vllm_nld::accept_prefix", mutates_args=())
def accept_prefix(drafts: Tensor, targets: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``(accepted, tokens, token_starts, seeds)``; shapes and dtypes: ``docs/operators.md``."""
    accepted: tuple[Tensor, Tensor, Tensor, Tensor] = function("accept_prefix", drafts.device.type)(
        drafts, targets, starts
    )
    return accepted


@accept_prefix.register_fake
def fake_accept_prefix(drafts: Tensor, targets: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return tensors of the results' shapes and dtypes, for tracing."""
    rows = starts.shape[0] - 1
    return (
        starts.new_empty(rows),
        targets.new_empty(targets.shape[0]),
        starts.new_empty(rows + 1),
        targets.new_empty(rows),
    )


@torch.library.custom_op("vllm_nld::move_kv", mutates_args=("caches",))
def move_kv(caches: list[Tensor], sources: Tensor, targets: Tensor) -> None:
    """Copy keys and values of slots to other slots, in all layers; shapes and dtypes: ``docs/operators.md``."""
    function("move_kv", sources.device.type)(caches, sources, targets)


@torch.library.custom_op("vllm_nld::best_tokens", mutates_args=())
def best_tokens(logits: Tensor, with_normaliser: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(tokens, largest, normaliser)``; shapes and dtypes: ``docs/operators.md``."""
    best: tuple[Tensor, Tensor, Tensor] = function("best_tokens", logits.device.type)(logits, with_normaliser)
    return best


def check_logits(logits: Tensor) -> None:
    """Raise NLDError for logits that ``best_tokens`` does not take, as the C++ operator does for its own."""
    if logits.dim() != 2:
        raise NLDError(f"best_tokens: logits has {logits.dim()} dimensions; needed: 2")
    if logits.shape[1] == 0:
        raise NLDError("best_tokens: logits has no columns; needed: 1 or more")
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise NLDError(f"best_tokens: logits has inner stride {logits.stride(1)}; needed: 1")
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise NLDError(f"best_tokens: logits is {logits.dtype}; allowed: float32, bfloat16, float16")


@best_tokens.register_fake
def fake_best_tokens(logits: Tensor, with_normaliser: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Return tensors of the results' shapes and dtypes, for tracing."""
    rows = logits.shape[0]
    return (
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty(rows if with_normaliser else 0, dtype=torch.float32),
    )


def native_library() -> Path | None:
    """Return the compiled CPU library's path, or None where the install is pure Python.

    An editable install keeps it in site-packages, beside the package that is in the source tree.
    """
    for folder in vllm_nld.__path__:
        path = Path(folder) / "native" / "libvllm_nld_cpu.so"
        if path.is_file():
            return path
    return None
