"""Test tiers by folder, and an environment in which engines run inside the test process."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
from pathlib import Path

import pytest

from tests.support import STARTUP
from tests.support.interpreted import hasten_interpreter

TESTS = Path(__file__).parent

LAST = ("v2", "server", "engine")
"""Tiers with long tests, which come last, when Ray's, next to them, are usually over. The first two have one long file
each, the third has many short ones, so neither process waits long for the other at the end."""

# Processes that the tests start collect garbage less often, from their first import on (so does this one from here),
# end at once, and sleep while they wait for each other.
_startup = str(STARTUP)
if _startup not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (_startup, os.environ.get("PYTHONPATH"))))
    importlib.import_module("tests.support.startup.sitecustomize")

# Each process of pytest-xdist works on one core, because threads spin while they wait for each other, and engines on
# the same cores are many times slower than one. Set before torch is imported, because torch counts the cores then.
_process = os.environ.get("PYTEST_XDIST_WORKER")
if _process and hasattr(os, "sched_setaffinity"):
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cores[int(_process.removeprefix("gw")) % len(_cores)]})

with contextlib.suppress(ImportError):  # tests/gpu does not need it
    from hypothesis import settings

    # Equal examples in every run, and no failures because of slowness.
    settings.register_profile("tests", derandomize=True, deadline=None, database=None)
    settings.load_profile("tests")

# Set before vLLM is imported, so that in-process engines can be inspected and use both cores.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")  # on a GPU, Triton would multiply float32 in TF32

if os.environ.get("TRITON_INTERPRET") == "1":
    hasten_interpreter()


def _tier(item: pytest.Item) -> str:
    return item.path.relative_to(TESTS).parts[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(getattr(pytest.mark, _tier(item)))
    items.sort(key=lambda item: LAST.index(_tier(item)) if _tier(item) in LAST else -1)


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collections: it is most of all objects, and never is garbage."""
    gc.freeze()
