"""Engine processes forked from one that has imported vLLM: spawned, each of them takes ten seconds to import it.

After the import, an engine core is as one that vLLM spawns: its arguments are pickled, it loads plugins, and it has the
environment of the process that starts it. It forks its workers, as vLLM does on GPUs.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

import pytest

IMPORTED = ["vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor", "vllm_nld.worker.cpu"]


def _run(environment: dict[str, str], target: Callable[..., Any], arguments: dict[str, Any]) -> None:
    import torch
    from vllm.v1.executor import multiproc_executor

    # One thread for each worker. vLLM sets OpenMP's environment for that, but the fork server has read it before.
    torch.set_num_threads(1)
    os.environ.clear()  # the fork server's environment is that of the first engine
    os.environ.update(environment)
    multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")
    target(**arguments)


class _Process(ForkServerProcess):
    def start(self) -> None:
        target, arguments = self._target, self._kwargs  # type: ignore[has-type]
        self._kwargs = {"environment": dict(os.environ), "target": target, "arguments": arguments}
        self._target = _run
        super().start()


class _Context(ForkServerContext):
    Process = _Process  # type: ignore[assignment]


@functools.cache
def _context() -> _Context:
    made = _Context()
    made.set_forkserver_preload(IMPORTED)
    return made


def import_ahead() -> None:
    """Start the server now, which then imports vLLM while this process does, on another core."""
    _context()
    forkserver.ensure_running()


def fork_engines(patch: pytest.MonkeyPatch) -> None:
    """Have vLLM's engine cores forked from one server, for as long as ``patch`` holds."""
    from vllm.v1.engine import utils

    patch.setattr(utils, "get_mp_context", _context)
