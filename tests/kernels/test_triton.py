"""Tests only for the Triton kernels: splitting of prefixes, and reasons why they cannot run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from tests.kernels import cases
from tests.kernels.implementations import DEVICES, INTERPRETING
from vllm_nld.ops import triton_ops

NATIVE_OR_INTERPRETED = DEVICES if INTERPRETING else DEVICES[1:]


@pytest.mark.parametrize("device", NATIVE_OR_INTERPRETED)
@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(spec=cases.attention_specs(longest_prefix=150, longest_block=10, most_heads=4, head_dims=(32, 80)))
def test_split_prefixes(device: str, spec: cases.AttentionSpec) -> None:
    """Parts as short as 16 tokens, so that a batch has full, partial and empty ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_ops, "_LEAST_SPLIT", 16)
        patch.setattr(triton_ops, "_processors", lambda device: 1000)
        patch.setattr(triton_ops, "_MOST_SPLITS", 5)
        cases.check(triton_ops, spec, torch.float32, device)


@pytest.mark.parametrize(
    ("programs", "max_prefix", "expected"),
    [(1, 100, 1), (1, 1024, 4), (1, 100_000, 32), (100, 100_000, 3), (500, 9999, 1)],
)
def test_split_count(programs: int, max_prefix: int, expected: int) -> None:
    assert triton_ops.split_count(programs, max_prefix, processors=132) == expected


def test_reports_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_ops, "_interpreted", lambda: False)
    assert "TRITON_INTERPRET=1" in str(triton_ops.unavailable(torch.device("cpu")))
    assert triton_ops.unavailable(torch.device("cuda")) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "not installed" in str(triton_ops.unavailable(torch.device("cuda")))
