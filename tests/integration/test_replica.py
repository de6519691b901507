"""Claimed cores, and processes that end with their parent, tested with real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vllm_nld.errors import NLDError
from vllm_nld.serving.replica import claim_cores

CLAIM = """
import os, sys
from vllm_nld.errors import NLDError
from vllm_nld.serving.replica import claim_cores
os.sched_getaffinity = lambda _: {0, 1, 2, 3}
try:
    claimed = claim_cores(int(sys.argv[1]), int(sys.argv[2]), patience=0.1)
    print(claimed, os.environ["VLLM_CPU_OMP_THREADS_BIND"], flush=True)
except NLDError as error:
    print(error, flush=True)
sys.stdin.read()
"""
GUARDED = """
import subprocess, sys, time
from types import SimpleNamespace
from vllm_nld.serving.replica import Guard
guard = Guard()
guard.forget_metrics_of(SimpleNamespace(instance_id=sys.argv[1]))
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""
WATCHED = """
import asyncio, sys
from vllm_nld.serving.replica import end_with
class Engine:
    looks = 0
    async def check_health(self):
        self.looks += 1
        if sys.argv[1].startswith("dies") and self.looks > 2:
            raise RuntimeError("the core is dead")
    async def is_sleeping(self):
        if sys.argv[1] == "hangs" and self.looks > 2 or sys.argv[1] == "dies when asked":
            await asyncio.sleep(60)
        if self.looks > 5:
            sys.exit(0)
asyncio.run(end_with(Engine(), timeout=float(sys.argv[2]), period=0.01))
"""


def start(code: str, *arguments: str, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *arguments]
    environment = os.environ | {"TMPDIR": str(folder)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_replicas_share_no_core_and_release_cores_when_killed(tmp_path: Path) -> None:
    holders = [start(CLAIM, "1", "2", folder=tmp_path) for _ in range(2)]
    try:
        assert sorted(map(first_line, holders)) == ["0|1 0|1", "2|3 2|3"]
        late = start(CLAIM, "1", "2", folder=tmp_path)
        holders.append(late)
        assert "all 2 groups of 2 cores" in first_line(late)
        holders[0].kill()
        holders[0].wait(60)
        holders.append(start(CLAIM, "1", "2", folder=tmp_path))
        assert first_line(holders[-1]) in ("0|1 0|1", "2|3 2|3")
    finally:
        for holder in holders:
            holder.kill()


def test_too_many_cores_cannot_be_claimed() -> None:
    with pytest.raises(NLDError, match=r"cores per worker=4096 with 2 workers: allowed are 1 to"):
        claim_cores(4096, 2)


def test_children_end_when_their_process_is_killed(tmp_path: Path) -> None:
    parent = start(GUARDED, "my-engine", folder=tmp_path)
    child = int(first_line(parent))
    snapshot = tmp_path / f"vllm-nld-{os.getuid()}-my-engine-0.json"
    snapshot.write_text("{}")
    parent.send_signal(signal.SIGKILL)
    parent.wait(60)
    for _ in range(2400):  # the guard may still be importing
        if not Path(f"/proc/{child}").exists() and not snapshot.exists():
            break
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()
    assert not snapshot.exists()


@pytest.mark.parametrize(
    ("fate", "timeout", "status", "words"),
    [
        ("dies", 30, 1, "RuntimeError: the core is dead"),
        ("dies when asked", 30, 1, "RuntimeError: the core is dead"),
        ("hangs", 0.2, 1, "did not answer for 0.2 s"),
        ("lives", 0.2, 0, ""),
    ],
)
def test_process_ends_with_its_engine(tmp_path: Path, fate: str, timeout: float, status: int, words: str) -> None:
    process = start(WATCHED, fate, str(timeout), folder=tmp_path)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == status, errors
    assert words in errors
