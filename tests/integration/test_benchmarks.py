"""The scripts in ``benchmarks/`` start: they import each other and the package, and no other test runs them."""

from __future__ import annotations

import importlib
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vllm_nld.ops import cpp_ops

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(FOLDER.glob("*.py"))


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In this process, which has imported the slow modules; a script's folder is the first that it imports from."""
    monkeypatch.syspath_prepend(FOLDER)
    yield
    for script in SCRIPTS:
        sys.modules.pop(script.stem, None)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_benchmark_starts(script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_attention_is_measured_on_this_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Compared with vLLM's attention from the build for this CPU; another build's is an illegal instruction."""
    reason = cpp_ops.unavailable(torch.device("cpu"))
    if reason:
        pytest.skip(f"C++ operators: {reason}")
    attention = importlib.import_module("attention")
    monkeypatch.setattr(attention, "machine", lambda _: {"gemm_gflops": 1.0, "copy_gb_per_s": 1.0})
    arguments = ["--prefix", "40", "--length", "3", "--rows", "2", "--seconds", "0"]
    monkeypatch.setattr(sys, "argv", ["attention.py", *arguments])
    attention.main()
    assert '"stock_to_ours": ' in capsys.readouterr().out
