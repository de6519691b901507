"""Which vLLM the contracts are checked against.

By default this is the installed one. Set ``VLLM_SOURCES`` to check others without installing them: package folders,
separated by colons, as made by ``pip download --no-deps vllm==0.33.0`` and ``unzip``.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from tests.contracts.vllm_source import VllmSource


def _folders() -> list[Path]:
    given = os.environ.get("VLLM_SOURCES")
    if given:
        return [Path(folder) for folder in given.split(":")]
    found = importlib.util.find_spec("vllm")
    assert found is not None and found.submodule_search_locations is not None, "vLLM is not installed"
    return [Path(found.submodule_search_locations[0])]


@pytest.fixture(scope="session", params=_folders(), ids=lambda folder: folder.parent.name)
def vllm(request: pytest.FixtureRequest) -> VllmSource:
    """The source of one vLLM version."""
    return VllmSource(request.param)
