"""The bookkeeping of ``scripts/gpu_check.sh``: how a step that hangs or crashes affects the others."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from gpu_check import plan, record, report
from gpu_check.plan import Step
from gpu_check.steps.forwards import covered, idle_gaps
from gpu_check.supervise import Supervisor

# Replaces gpu_check.child: takes the same arguments, and does what a step's name says.
CHILD = """
import os, sys, time
from pathlib import Path
from gpu_check.record import Record
steps = sys.argv[1 : sys.argv.index("--out")]
out, origin = sys.argv[sys.argv.index("--out") + 1], float(sys.argv[sys.argv.index("--origin") + 1])
for name in steps:
    record = Record(Path(out), name, origin)
    record.event("started")
    record.figure("pid", os.getpid())
    if name == "hangs":
        time.sleep(100)
    if name == "crashes":
        os.abort()
    record.event("done")
"""


@pytest.fixture
def supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Supervisor:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "benchmarks"))
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    return Supervisor(tmp_path, "cuda", time.time(), 60.0, (sys.executable, str(script)))


def steps(*names: str, session: str = "one") -> list[Step]:
    return [Step(name, name, session, 0.5 if name == "hangs" else 20, 0) for name in names]


def test_steps_of_a_session_share_a_process(supervisor: Supervisor) -> None:
    states = supervisor.run([*steps("a", "b"), *steps("c", session="two")])
    assert states == {"a": "done", "b": "done", "c": "done"}
    pids = {name: record.value(supervisor.folder, name, "pid") for name in states}
    assert pids["a"] == pids["b"] != pids["c"]


@pytest.mark.parametrize(("name", "state"), [("hangs", "cut"), ("crashes", "failed")])
def test_failed_step_does_not_affect_others(supervisor: Supervisor, name: str, state: str) -> None:
    started = time.time()
    states = supervisor.run(steps("a", name, "b"))
    assert states == {"a": "done", name: state, "b": "done"}
    assert record.value(supervisor.folder, name, "pid") is not None, "its figures are kept"
    assert time.time() - started < 20


def test_steps_without_time_left_are_skipped(supervisor: Supervisor) -> None:
    supervisor.seconds = 1.0
    assert supervisor.run(steps("a")) == {"a": "skipped"}


def test_process_that_does_not_start_fails_its_steps_one_by_one(supervisor: Supervisor) -> None:
    supervisor.child = (sys.executable, "-c", "raise SystemExit(3)")
    assert supervisor.run(steps("a", "b")) == {"a": "failed", "b": "failed"}


def test_every_step_has_a_module_and_a_time() -> None:
    folder = Path(plan.__file__).parent / "steps"
    for step in plan.STEPS:
        assert (folder / f"{step.module}.py").is_file()
        assert step.seconds > 0
    assert len({step.name for step in plan.STEPS}) == len(plan.STEPS)


def test_idle_gaps_name_what_is_around_them() -> None:
    spans = [(9.0, 10.0, "d"), (0.0, 2.0, "a"), (1.0, 5.0, "b"), (1.5, 1.6, "c"), (10.0, 11.0, "e"), (11.5, 12.0, "f")]
    assert idle_gaps(spans) == [(4.0, "b", "d"), (0.5, "e", "f")]
    assert idle_gaps([]) == idle_gaps(spans[:1]) == []


def test_covered_time_counts_overlaps_once() -> None:
    assert covered([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.6)]) == 4.0


def test_figures_become_a_table(tmp_path: Path) -> None:
    found = record.Record(tmp_path, "times", time.time())
    found.figure("attention", 12.3456789, "us", of="triton", rows=8)
    found.event("cut", why="over the limit")
    text = report.markdown(tmp_path)
    assert "| attention | of triton, rows 8 | 12.346 us |" in text
    assert "times: cut, over the limit" in text
