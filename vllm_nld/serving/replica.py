"""Help for a process that hosts one of several engines: cores of its own, and an end that leaves nothing behind.

Ray, or another tool that starts replicas, restarts a process that died. It does not see that a process is useless
because its engine died or hangs. It also does not clean up after a killed process: vLLM's engine core does not notice
that its parent is gone, and keeps its memory and its device. The functions here end a process with a dead or hung
engine, and clean up after a killed one.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

from vllm_nld.errors import NLDError
from vllm_nld.serving.metrics import remove_snapshots, snapshot_prefix

ERROR_GRACE_SECONDS = 1.0
"""Seconds between the end of an engine and of its process, so that requests in flight can report to their callers."""

LOOK_SECONDS = 0.2
"""Seconds between two checks whether an engine that must answer is alive."""

_claims: list[int] = []
"""Lock files of this process's cores. The system releases them when the process ends, in any way."""


def claim_cores(per_worker: int, workers: int = 1, patience: float = 30.0) -> str:
    """Claim CPU cores that no other replica of this user has on this machine, and bind vLLM's threads to them.

    vLLM's CPU threads wait by spinning, so two engines on the same cores are many times slower than one. Call this
    before the engine is made.

    Args:
        per_worker: cores for each worker.
        workers: workers of the replica, that is, its tensor-parallel size.
        patience: seconds to wait for cores, because a killed replica may still hold them.

    Returns:
        The value of ``VLLM_CPU_OMP_THREADS_BIND``, for instance ``"0,1|2,3"``.

    Raises:
        NLDError: there are too few cores, or other replicas hold them.
    """
    cores = sorted(os.sched_getaffinity(0))
    size = per_worker * workers
    groups = [cores[start : start + size] for start in range(0, len(cores) - size + 1, size)] if size > 0 else []
    if not groups:
        raise NLDError(
            f"cores per worker={per_worker} with {workers} workers: allowed are 1 to {len(cores)} cores together here"
        )
    deadline = time.monotonic() + patience
    while True:
        for group in groups:
            if _lock(Path(tempfile.gettempdir()) / f"vllm-nld-{os.getuid()}-cores-{group[0]}-{size}.lock"):
                ranks = [group[start : start + per_worker] for start in range(0, size, per_worker)]
                binding = "|".join(",".join(map(str, rank)) for rank in ranks)
                os.environ["VLLM_CPU_OMP_THREADS_BIND"] = binding
                return binding
        if time.monotonic() > deadline:
            raise NLDError(
                f"cores per worker={per_worker}: all {len(groups)} groups of {size} cores on this machine belong to "
                "other replicas; start fewer replicas, or give each fewer cores"
            )
        time.sleep(0.2)


def _lock(path: Path) -> bool:
    handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return False
    _claims.append(handle)
    return True


class Guard:
    """A small process that waits for this one to end, for any cause, and then ends its children.

    Make it before the engine. The children are known by their process group, whose leader this process becomes.
    """

    def __init__(self) -> None:
        if os.getpgrp() != os.getpid():
            os.setpgid(0, 0)
        command = [sys.executable, "-m", "vllm_nld.serving.replica", str(os.getpgrp())]
        # In a session of its own; else it would end itself, or be ended with the process that it guards.
        self._guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def forget_metrics_of(self, vllm_config: Any) -> None:
        """Also remove the engine's metrics snapshots, which a killed worker cannot."""
        assert self._guard.stdin is not None
        self._guard.stdin.write(str(snapshot_prefix(vllm_config)).encode())
        self._guard.stdin.flush()


def _guard(group: int) -> None:
    # Only the guarded process holds the other end of the pipe, so the read ends when that process does.
    prefix = sys.stdin.buffer.read().decode()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    if prefix:
        remove_snapshots(Path(prefix))


async def check_engine(engine: Any, timeout: float) -> None:
    """Check that the engine core answers. It does so between two steps.

    Args:
        engine: vLLM's ``AsyncLLM``.
        timeout: seconds; choose more than the longest step takes.

    Raises:
        vllm.v1.engine.exceptions.EngineDeadError: the engine core, or a worker, has ended.
        TimeoutError: it did not answer.
    """
    await engine.check_health()
    answer = asyncio.ensure_future(engine.is_sleeping())
    deadline = time.monotonic() + timeout
    try:
        while not answer.done():
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"the engine core did not answer for {timeout:g} s")
            await asyncio.wait({answer}, timeout=min(left, LOOK_SECONDS))
            # If the core dies now, the question is never answered.
            await engine.check_health()
        answer.result()
    finally:
        answer.cancel()


async def end_with(engine: Any, timeout: float, period: float = 1.0) -> NoReturn:
    """Watch the engine, and end this process soon after the engine died or hung.

    A replica that cannot answer is worse than none, because it looks idle and attracts requests.

    Args:
        engine: vLLM's ``AsyncLLM``.
        timeout: seconds that the engine core may take to answer.
        period: seconds between two checks.
    """
    while True:
        try:
            await check_engine(engine, timeout)
        except Exception as error:
            print(f"vllm-nld: this replica ends: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            await asyncio.sleep(ERROR_GRACE_SECONDS)
            os._exit(1)
        await asyncio.sleep(period)


if __name__ == "__main__":
    _guard(int(sys.argv[1]))
