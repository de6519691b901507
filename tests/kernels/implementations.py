"""The implementations of the operators that the tests of this folder run: the registry's, on this machine's devices."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from vllm_nld.ops import IMPLEMENTATIONS, Implementation

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
INTERPRETED = ("triton",)
"""Also run on the CPU if Triton interprets; ``test_triton_interpreted.py`` starts that process."""


@dataclass(frozen=True)
class Effort:
    """How much an implementation is tested.

    Attributes:
        examples: batches that hypothesis draws.
        longest_prefix: longest prefix of a drawn batch.
        repeats: runs that must give the same bits.
    """

    examples: int = 100
    longest_prefix: int = 600
    repeats: int = 20


SLOW = {
    "torch": Effort(examples=20, repeats=3),
    "triton": Effort(examples=20, longest_prefix=200, repeats=3),
    "cpp": Effort(examples=50),
}
"""Fewer for those that take long for one batch, or get it in every instruction set; the others get the default."""


def effort(implementation: Implementation) -> Effort:
    """Return how much to test an implementation."""
    return SLOW.get(implementation.name, Effort())


def having(operator: str) -> list[Any]:
    """Parameters (implementation, device) of a test of one operator."""
    return [
        pytest.param(implementation, device, id=f"{implementation.name}-{device}")
        for implementation in IMPLEMENTATIONS
        if operator in implementation.operators
        for device in DEVICES
        if device in implementation.devices or (INTERPRETING and implementation.name in INTERPRETED)
    ]


def skip_unless_usable(implementation: Implementation, device: str) -> None:
    """Skip the test, with the implementation's own reason, if it cannot run."""
    reason = implementation.obstacle(torch.device(device))
    if reason:
        pytest.skip(f"{implementation.name}: {reason}")
