"""Tables of commands can be read where no terminal shows them."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from vllm_nld.cli import app


def test_headings_are_whole_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    shown = CliRunner().invoke(app, ["plan", "8b", "--concurrency", "1"]).stdout
    for heading in ("requests", "tokens/s per GPU", "self_speculation 32 (best)"):
        assert heading in shown, shown
    assert "…" not in shown
