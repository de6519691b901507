"""How the tests find and end processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

SMALL_REPLICA = ["--cores", "1", "--num-cpus", "0.5", "--num-gpus", "0"]
"""Options of both examples with which two replicas fit two cores."""
EXAMPLES = Path(__file__).parents[2] / "examples"


def address_of(cluster: Any) -> str:
    """Return the address of the fixture ``ray_cluster``, which is the address or has one."""
    return getattr(cluster, "address", cluster)


STARTS = 480.0
"""Seconds for a replica to start. It imports vLLM twice, the second time in its engine core, on the cores that others
leave free: half a minute on two idle cores. The limit is long because only a failing test waits that long."""

SOON = 120.0
"""Seconds for what takes a few on idle cores, for the same reason. Without what is tested, it would never happen."""


def wait_for(condition: Callable[[], bool], seconds: float, what: str, seen: Callable[[], object] = str) -> float:
    """Return the seconds until ``condition()`` holds; after ``seconds``, fail and report ``seen()``."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, f"not within {seconds} s: {what}; {seen()}"
        time.sleep(0.1)
    return time.monotonic() - started


def engine_processes(replica: int) -> list[psutil.Process]:
    """Return the engine core of a replica's process and its workers, the core first.

    Raises:
        ValueError: it has no engine core yet, or no longer has one.
    """
    children = psutil.Process(replica).children(recursive=True)
    cores = [child for child in children if _name(child).startswith("VLLM::EngineCor")]
    if not cores:
        raise ValueError(f"process {replica} has no engine core among {[_name(child) for child in children]}")
    # A process that a core is about to start has the core's name until it runs its own program.
    core = min(cores, key=psutil.Process.create_time)
    return [core, *core.children(recursive=True)]


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def replicas(title: str) -> set[int]:
    """Return the ids of the processes whose title begins so.

    Ray rewrites the title of a busy actor at every call, so a look may miss one. Ask Ray for busy actors.
    """
    found = psutil.process_iter(["cmdline"])
    return {process.pid for process in found if " ".join(process.info["cmdline"] or []).startswith(title)}


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
