"""The tests find a replica's engine core even if it has no title, as happens in Ray's workers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import SOON, alive, engine_processes, wait_for

REPLICA = """
import multiprocessing, os, subprocess, sys, time
from vllm_nld.serving.replica import Guard

def core(changed, pids):
    import setproctitle
    os.environ[changed] = "2"
    setproctitle.setproctitle("VLLM::EngineCore")
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    pids.put([os.getpid(), worker.pid])
    time.sleep(600)

if __name__ == "__main__":
    guard = Guard()
    context = multiprocessing.get_context("spawn")
    pids = context.Queue()
    context.Process(target=core, args=[sys.argv[1], pids]).start()
    print(*pids.get(), flush=True)
    time.sleep(600)
"""
"""A replica: a guard, the helper of ``multiprocessing``, and a core with a worker, as vLLM and Ray arrange them."""


@pytest.mark.parametrize(("changed", "titled"), [("FIRST", False), ("SECOND", True)], ids=["no title", "title"])
def test_an_engine_core_is_found_with_or_without_its_title(tmp_path: Path, changed: str, titled: bool) -> None:
    """``setproctitle`` finds no room for a title if the first variable of the environment was changed."""
    script = tmp_path / "replica.py"
    script.write_text(REPLICA)
    environment = {"FIRST": "1", "SECOND": "1"}
    with subprocess.Popen(
        [sys.executable, str(script), changed], stdout=subprocess.PIPE, text=True, env=environment
    ) as replica:
        try:
            assert replica.stdout is not None
            expected = [int(pid) for pid in replica.stdout.readline().split()]
            found = engine_processes(replica.pid)
            assert ("VLLM::EngineCore" in found[0].cmdline()) == titled
        finally:
            replica.kill()
    assert [process.pid for process in found] == expected
    wait_for(lambda: not alive(found), SOON, "the guard ends them")


def test_a_process_without_a_core_has_no_engine() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        with pytest.raises(ValueError, match=f"process {process.pid} has 0 engine cores"):
            engine_processes(process.pid)
        assert process.stdin is not None
        process.stdin.write(b"\n")
