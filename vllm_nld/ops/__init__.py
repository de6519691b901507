"""The operators of ``docs/developer/operators.md``, whichever implementation computes them.

One interface, several implementations: C++ (CPU), CUDA, Triton, FlashAttention, xformers, and PyTorch as the
reference. The choice for a device is made once, from what is installed; ``VLLM_NLD_OPS`` forces one by name. To add
one: ``docs/developer/add_an_operator_implementation.md``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from vllm_nld.errors import NLDError
from vllm_nld.ops import cpp_ops, cuda_ops, flash_ops, torch_ops, triton_ops, xformers_ops
from vllm_nld.ops.arguments import BIDIRECTIONAL, CAUSAL, BlockAttention
from vllm_nld.ops.implementation import OPERATORS, Implementation

ENVIRONMENT_VARIABLE = "VLLM_NLD_OPS"

IMPLEMENTATIONS: tuple[Implementation, ...] = (
    cpp_ops.IMPLEMENTATION,
    cuda_ops.IMPLEMENTATION,
    triton_ops.IMPLEMENTATION,
    flash_ops.IMPLEMENTATION,
    xformers_ops.IMPLEMENTATION,
    torch_ops.IMPLEMENTATION,
)
"""In order of preference. The last one has all operators and runs everywhere."""

__all__ = [
    "BIDIRECTIONAL",
    "CAUSAL",
    "ENVIRONMENT_VARIABLE",
    "IMPLEMENTATIONS",
    "OPERATORS",
    "BlockAttention",
    "Implementation",
    "function",
    "implementation",
]


@cache
def implementation(
    operator: str,
    device_type: str,
    dtype: torch.dtype | None = None,
    captured: bool = False,
    from_float8: bool = False,
) -> Implementation:
    """Return the implementation that computes an operator on a device.

    Args:
        operator: one of ``OPERATORS``.
        device_type: such as "cuda".
        dtype: of the query; None: any.
        captured: whether a CUDA graph is to hold the call. It then costs the host nothing to launch.
        from_float8: whether it is to read float8 pages, and no float8 query multiplies them.

    Raises:
        NLDError: ``VLLM_NLD_OPS`` names an implementation that is unknown or does not run here.
    """
    device, wanted = torch.device(device_type), os.environ.get(ENVIRONMENT_VARIABLE)
    names = [candidate.name for candidate in IMPLEMENTATIONS]
    if wanted is not None and wanted not in names:
        raise NLDError(f"{ENVIRONMENT_VARIABLE}={wanted}: allowed are {', '.join(names)}")

    def rank(one: Implementation) -> tuple[bool, bool]:
        return from_float8 and one.copies_float8, not (captured and one.first_in_graphs)

    for candidate in sorted(IMPLEMENTATIONS, key=rank):
        reason = candidate.unavailable(device)
        if candidate.name == wanted and reason is not None:
            raise NLDError(f"{ENVIRONMENT_VARIABLE}={wanted} does not run on {device_type}: {reason}")
        fits = operator in candidate.operators and (dtype is None or dtype in candidate.dtypes)
        if reason is None and wanted in (None, candidate.name) and fits:
            return candidate
    return IMPLEMENTATIONS[-1]  # the forced one lacks this operator or dtype; PyTorch has all


@cache
def function(
    operator: str,
    device_type: str,
    dtype: torch.dtype | None = None,
    captured: bool = False,
    from_float8: bool = False,
) -> Callable[..., Any]:
    """Return what :func:`implementation` chooses, to be called outside compiled code."""
    chosen: Callable[..., Any] = getattr(implementation(operator, device_type, dtype, captured, from_float8), operator)
    return chosen
