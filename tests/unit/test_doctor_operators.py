"""``doctor`` names what computes each operator, and the documentation what each implementation can do."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_nld import ops
from vllm_nld.cli.doctor import _operator_packages, _operators
from vllm_nld.ops import Implementation, torch_ops, xformers_ops

DOCUMENTATION = Path(__file__).parents[2] / "docs/developer/operators.md"


def test_operator_with_another_implementation_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"block_attention": xformers_ops.IMPLEMENTATION}
    monkeypatch.setattr(
        ops, "implementation", lambda operator, _, captured=False: chosen.get(operator, torch_ops.IMPLEMENTATION)
    )
    assert "xformers (accept_prefix, best_tokens: torch)" in _operators()


def names(implementation: Implementation) -> str:
    return implementation.name


@pytest.mark.parametrize("implementation", ops.IMPLEMENTATIONS, ids=names)
def test_implementation_of_all_operators_is_named_once(
    implementation: Implementation, monkeypatch: pytest.MonkeyPatch
) -> None:
    if implementation.unavailable(torch.device("cpu")) or implementation.operators != ops.OPERATORS:
        pytest.skip(f"{implementation.name} does not compute all of them here")
    monkeypatch.setattr(ops, "implementation", lambda operator, _, captured=False: implementation)
    assert _operators().startswith(implementation.name)
    assert "best_tokens" not in _operators()


def test_choice_depends_on_dtype_and_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU where all run: the first of the list, but in graphs the one that is fast there, if the dtype fits."""
    usable = [dataclasses.replace(one, obstacle=lambda _: None) for one in ops.IMPLEMENTATIONS]
    monkeypatch.setattr(ops, "IMPLEMENTATIONS", tuple(usable))
    monkeypatch.delenv(ops.ENVIRONMENT_VARIABLE, raising=False)

    def chosen(*settings: Any, operator: str = "block_attention") -> str:
        return ops.implementation.__wrapped__(operator, "cuda", *settings).name

    assert [chosen(), chosen(torch.bfloat16), chosen(torch.float32)] == ["cuda"] * 3
    assert [chosen(torch.bfloat16, True), chosen(torch.float32, True)] == ["flash", "cuda"]
    assert [chosen(torch.bfloat16, graph, True) for graph in (False, True)] == ["cuda"] * 2  # flash would copy float8
    assert chosen(None, True, operator="best_tokens") == "cuda"
    monkeypatch.setenv(ops.ENVIRONMENT_VARIABLE, "xformers")
    assert [chosen(torch.bfloat16, True), chosen(torch.float32)] == ["xformers", "torch"]


def test_packages_of_implementations_are_named() -> None:
    assert {"triton", "xformers"} <= set(_operator_packages())


@pytest.mark.parametrize("name", ["cuda", "triton", "torch"])
def test_gpu_implementations_have_all_operators(name: str) -> None:
    """The drafts' logits are largest there, so no operator may fall back to PyTorch."""
    assert next(one for one in ops.IMPLEMENTATIONS if one.name == name).operators == ops.OPERATORS


def test_last_implementation_has_all_operators_on_every_device() -> None:
    last = ops.IMPLEMENTATIONS[-1]
    assert last.operators == ops.OPERATORS
    assert set(last.devices) == {device for one in ops.IMPLEMENTATIONS for device in one.devices}
    assert all(last.unavailable(torch.device(device)) is None for device in last.devices)


@pytest.mark.parametrize("implementation", ops.IMPLEMENTATIONS, ids=names)
def test_implementation_has_its_line_in_the_documentation(implementation: Implementation) -> None:
    assert row(implementation) in DOCUMENTATION.read_text().splitlines()


def test_implementations_are_documented_in_order_of_preference() -> None:
    lines = DOCUMENTATION.read_text().splitlines()
    places = [lines.index(row(implementation)) for implementation in ops.IMPLEMENTATIONS]
    assert places == list(range(places[0], places[0] + len(places)))


def row(one: Implementation) -> str:
    """The line of an implementation in the table of docs/developer/operators.md."""
    operators = "all" if one.operators == ops.OPERATORS else ", ".join(one.operators)
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in one.dtypes)
    yes = {True: "yes", False: "no"}
    cells = one.name, ", ".join(one.devices), operators, dtypes, yes[one.reads_tiles], yes[one.graph_safe], one.needs
    return f"| {' | '.join(cells)} |"
