"""Every row of ``docs/developer/patches.md`` names a place that exists and a test that guards it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def rows() -> list[list[str]]:
    """Return the cells of the ledger's rows: what, why, where, seen, guard, goes when."""
    lines = (ROOT / "docs/developer/patches.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [row for row in cells if row[0] != "what"]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0][:40])
def test_ledger_rows_are_complete(row: list[str]) -> None:
    _, why, where, _, guard, goes = row
    assert why and goes
    for file in quoted(where):
        assert (ROOT / "vllm_nld" / file).is_file(), f"{file} is gone"
    tests = "\n".join(file.read_text() for file in sorted((ROOT / "tests").rglob("test_*.py")))
    assert quoted(guard), "a row needs a test"
    for name in quoted(guard):
        assert f"def {name}(" in tests, f"no test {name}"


def replaced(file: Path) -> list[str]:
    """Return the attributes of other objects to which a file assigns a function that it defines in place."""
    found: list[str] = []
    for scope in ast.walk(ast.parse(file.read_text())):
        if not isinstance(scope, ast.FunctionDef):
            continue
        own = {node.name for node in scope.body if isinstance(node, ast.FunctionDef)}
        for node in scope.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name) and node.value.id in own:
                found += [target.attr for target in node.targets if isinstance(target, ast.Attribute)]
    return found


def test_every_replaced_function_is_in_the_ledger() -> None:
    names = {name for file in sorted((ROOT / "vllm_nld").rglob("*.py")) for name in replaced(file)}
    assert {"__post_init__", "process_inputs", "expand_batch_to_tokens", "forward"} <= names, "the search works"
    ledger = (ROOT / "docs/developer/patches.md").read_text()
    assert not [name for name in sorted(names) if name not in ledger]
