"""Deciding tokens never waits for a GPU: nothing is read back, and nothing is copied to it from pageable memory.

Tensors on the device "meta" replace a GPU's. They have no data, so any read fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vllm_nld import ops
from vllm_nld.model.best_tokens import best_of, combine, shard_summary
from vllm_nld.ops import torch_ops
from vllm_nld.vllm_glue.greedy_verify import verify_greedily

GPU = torch.device("meta")


class Crossings(TorchDispatchMode):
    """Records operations between devices. Filling a tensor with a number is not one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)}
        if len(devices) > 1 or func is torch.ops.aten._local_scalar_dense.default:
            self.seen.append(str(func))
        return result


@pytest.fixture
def crossings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The list of operations that would wait; the operators are PyTorch's."""
    monkeypatch.setattr(ops, "function", lambda operator, _: getattr(torch_ops, operator))
    make_tensor = torch.tensor
    with Crossings() as mode:

        def tensor(data: Any, *, device: torch.device | None = None, **kwargs: Any) -> Tensor:
            if device is not None and device.type != "cpu":
                mode.seen.append("torch.tensor")
            return make_tensor(data, device=device, **kwargs)

        monkeypatch.setattr(torch, "tensor", tensor)
        yield mode.seen


def test_device_crossings_are_detected(crossings: list[str]) -> None:
    torch.zeros(3, device=GPU) + 1
    assert crossings == []
    torch.tensor([1.0, 2.0]).to(GPU)
    torch.tensor([1.0, 2.0], device=GPU)
    assert crossings == ["aten._to_copy.default", "torch.tensor"]
    with pytest.raises(RuntimeError):
        torch.zeros(1, device=GPU).item()


@pytest.mark.parametrize("columns", [64, 0])
def test_choice_of_best_tokens_does_not_wait(crossings: list[str], columns: int) -> None:
    """Whole logits, and those of a rank; a small vocabulary leaves some ranks none."""
    logits = torch.empty(5, columns, dtype=torch.bfloat16, device=GPU)
    summary = shard_summary(logits, 64)
    combine(torch.stack((summary, summary)))
    if columns:
        best_of(logits)
    assert crossings == []


def test_greedy_verification_does_not_wait(crossings: list[str]) -> None:
    metadata = SimpleNamespace(
        cu_num_draft_tokens=torch.empty(3, dtype=torch.int32, device=GPU),
        draft_token_ids=torch.empty(9, dtype=torch.int32, device=GPU),
        target_logits_indices=torch.empty(9, dtype=torch.int32, device=GPU),
        bonus_logits_indices=torch.empty(3, dtype=torch.int32, device=GPU),
        max_spec_len=4,
    )
    verify_greedily(metadata, torch.empty(12, 64, dtype=torch.bfloat16, device=GPU))
    assert crossings == []
