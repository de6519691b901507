"""``doctor`` names what computes each operator."""

from __future__ import annotations

import pytest

from vllm_nld import ops
from vllm_nld.cli.doctor import _operators


def test_operator_with_another_implementation_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    by_name = {implementation.name: implementation for implementation in ops.IMPLEMENTATIONS}
    monkeypatch.setattr(
        ops, "implementation", lambda operator, _: by_name["xformers" if operator == "block_attention" else "torch"]
    )
    assert "xformers (accept_prefix, move_kv, best_tokens: torch)" in _operators()


@pytest.mark.parametrize("name", ["cpp", "torch"])
def test_implementation_of_all_operators_is_named_once(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    by_name = {implementation.name: implementation for implementation in ops.IMPLEMENTATIONS}
    if by_name[name].unavailable(ops.torch.device("cpu")):
        pytest.skip(f"no {name} here")
    monkeypatch.setattr(ops, "implementation", lambda operator, _: by_name[name])
    assert "best_tokens" not in _operators()


@pytest.mark.parametrize("name", ["cuda", "triton", "torch"])
def test_gpu_implementations_have_all_operators(name: str) -> None:
    """The drafts' logits are largest there, so no operator may fall back to PyTorch."""
    module = next(one for one in ops.IMPLEMENTATIONS if one.name == name).load()
    assert [operator for operator in ops.OPERATORS if not hasattr(module, operator)] == []
