"""How the tests find processes, and wait for them."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil

STARTS = 480.0
"""Seconds for a replica to start. It imports vLLM twice, the second time in its engine core, on the cores that others
leave free: half a minute on two idle cores. The limit is long because only a failing test waits that long."""

SOON = 120.0
"""Seconds for what takes a few on idle cores, for the same reason. Without what is tested, it would never happen."""


def wait_for(
    condition: Callable[[], bool],
    seconds: float,
    what: str,
    seen: Callable[[], object] = str,
    every: float = 0.1,
) -> float:
    """Check ``condition()`` every ``every`` seconds; return the seconds until it holds.

    After ``seconds``, fail, say ``what`` did not happen, and report ``seen()``.
    """
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, f"not within {seconds} s: {what}; {seen()}"
        time.sleep(every)
    return time.monotonic() - started


def engine_processes(replica: int) -> list[psutil.Process]:
    """Return the engine core of a replica's process and its workers, the core first.

    The core is the only child that ``multiprocessing`` started, besides its helper. Its title does not always say so:
    ``setproctitle`` does nothing, and says nothing, if a process has already changed its first environment variable.
    vLLM's processes change a dozen, and Ray gives each worker its environment in random order.

    Raises:
        ValueError: it has no engine core yet, or no longer has one.
    """
    children = {child: _command(child) for child in psutil.Process(replica).children()}
    cores = [child for child, command in children.items() if _is_engine_core(command)]
    if len(cores) != 1:
        raise ValueError(f"process {replica} has {len(cores)} engine cores among {list(children.values())}")
    return [*cores, *cores[0].children(recursive=True)]


def _is_engine_core(command: str) -> bool:
    return command.startswith("VLLM::EngineCore") or "--multiprocessing-fork" in command


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
