"""``scripts/gpu_check.sh --dry-run``: every step's code, on a CPU with tiny sizes, in a process as a user starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_check import record
from gpu_check.build import ROOT

FIGURES = {
    "libraries": ("import vllm", "platform", "cache write", "largest difference from SDPA"),
    "kernels": ("tests",),
    "exactness": ("texts that agree with AR", "tokens before the first difference", "tokens a cycle"),
    "engine": ("engine start", "attention backend", "page layout", "graph mode", "operator", "auto mode's price"),
    "cycle": ("cycle", "AR step of this engine", "cycle in AR steps of this engine", "part of a cycle"),
    "forwards": ("causal forward", "draft forward and choice", "kernel launches", "waits", "idle share"),
    "memory": ("peak_activation_memory", "peak over the idle engine"),
    "second": (
        "engine start",
        "runner",
        "captured draft passes",
        "cycle",
        "cycle in which half of the requests decode by AR",
        "texts that agree with AR",
        "idle share",
    ),
    "baseline": ("engine start", "runner", "AR step", "cycle in AR steps", "cycle on the second runner in AR steps"),
    "times": ("attention", "host", "largest difference from SDPA"),
    "cycle-3b": ("engine start", "cycle", "part of a cycle"),
    "second-3b": ("engine start", "cycle", "waits"),
    "baseline-3b": ("AR step", "cycle in AR steps"),
    "engine-tests": ("tests",),
}


@pytest.mark.timeout(1800)  # a minute on two free cores; the other tests share them
def test_dry_run_measures_every_figure(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    environment.pop("VLLM_LOGGING_LEVEL", None)  # vLLM's warnings are a figure
    command = [ROOT / "scripts" / "gpu_check.sh", "--dry-run", "--minutes", "28", "--out", tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1750)
    logs = "\n".join(log.read_text()[-4000:] for log in tmp_path.glob("*.log"))
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{logs}"
    lines = record.read(tmp_path)
    for step, names in FIGURES.items():
        events = [line["event"] for line in lines if line["step"] == step and "event" in line]
        assert events == ["started", "done"], step
        found = {line["figure"] for line in lines if line["step"] == step and "figure" in line}
        assert set(names) <= found, f"{step} lacks {set(names) - found}"
        assert f"{step:>12}  {names[0]}" in done.stdout, "figures are also printed"
    for requests in (1, 2):
        cycle = record.value(tmp_path, "cycle", "cycle", requests=requests)
        step = record.value(tmp_path, "baseline", "AR step", requests=requests)
        ratio = record.value(tmp_path, "baseline", "cycle in AR steps", requests=requests)
        assert ratio == pytest.approx(cycle / step, rel=1e-3)
    assert record.value(tmp_path, "exactness", "texts that agree with AR", of="tiny, float32, graphs") == "3 of 3"
