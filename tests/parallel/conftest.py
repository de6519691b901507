"""Engines of two processes, one core each: their OpenMP threads would spin against each other."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.support.forked import fork_engines, import_ahead


def pytest_sessionstart(session: pytest.Session) -> None:
    """Where this tier runs by itself; in other runs the first test that forks waits for the import."""
    if not session.config.option.collectonly:
        import_ahead()


def use_two_ranks(patch: pytest.MonkeyPatch) -> None:
    """Have the next engine run as in production: a core process, and two workers under vLLM's executor."""
    patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1" if (os.cpu_count() or 1) > 1 else "0|0")
    patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # collective_rpc takes functions
    patch.setenv("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "200")  # in case ranks wait for each other


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[None]:
    """Two ranks in forked processes of their own, for an engine that a module's tests share."""
    with pytest.MonkeyPatch.context() as patch:
        use_two_ranks(patch)
        fork_engines(patch)
        yield


@pytest.fixture
def two_ranks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks in forked processes of their own, for one test's engine."""
    use_two_ranks(monkeypatch)
    fork_engines(monkeypatch)


@pytest.fixture
def two_spawned_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks as ``vllm serve`` starts them, for one test's engine: each imports and registers everything itself."""
    use_two_ranks(monkeypatch)
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
