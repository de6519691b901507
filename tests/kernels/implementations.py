"""The implementations of the operators that the tests of this folder run. A new one needs one line."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
HALF = (torch.bfloat16, torch.float16)
OPERATORS = ("block_attention", "accept_prefix", "move_kv", "best_tokens")


@dataclass(frozen=True)
class Implementation:
    """A module with the operators as functions and, if it does not run everywhere, ``unavailable(device)``.

    Attributes:
        name: shown in test ids.
        module: import path.
        operators: which of the four it has.
        dtypes: types of the query.
        devices: where it runs; one that this machine lacks is left out.
        examples: batches that hypothesis draws; few if each takes long.
        longest_prefix: longest prefix of a drawn batch.
        repeats: runs that must give the same bits.
        tiles: reads pages in tiles.
        interpreted: runs on CPU only through Triton's interpreter; ``test_triton_interpreted.py`` starts that process.
    """

    name: str
    module: str
    operators: tuple[str, ...] = OPERATORS
    dtypes: tuple[torch.dtype, ...] = (torch.float32, *HALF)
    devices: tuple[str, ...] = ("cpu", "cuda")
    examples: int = 100
    longest_prefix: int = 600
    repeats: int = 20
    tiles: bool = False
    interpreted: bool = False

    def load(self, device: str) -> Any:
        """Import the module; skip the test, with the module's reason, if it cannot run."""
        module = importlib.import_module(self.module)
        unavailable = getattr(module, "unavailable", None)
        reason = unavailable(torch.device(device)) if unavailable else None
        if reason:
            pytest.skip(f"{self.name}: {reason}")
        return module


IMPLEMENTATIONS = (
    Implementation("torch", "vllm_nld.ops.torch_ops", examples=20, repeats=3, tiles=True),
    Implementation("cpp", "vllm_nld.ops.cpp_ops", devices=("cpu",), tiles=True),
    Implementation(
        "triton",
        "vllm_nld.ops.triton_ops",
        examples=20,
        longest_prefix=200,
        repeats=3,
        interpreted=True,
    ),
    Implementation("xformers", "vllm_nld.ops.xformers_ops", ("block_attention",), HALF, devices=("cuda",)),
)


def having(operator: str) -> list[Any]:
    """Parameters (implementation, device) of a test of one operator."""
    return [
        pytest.param(implementation, device, id=f"{implementation.name}-{device}")
        for implementation in IMPLEMENTATIONS
        if operator in implementation.operators
        for device in DEVICES
        if device in implementation.devices
        if INTERPRETING or device != "cpu" or not implementation.interpreted
    ]
