"""This tier's tests want an environment that no other tier's do, so they run in a process of their own.

``test_second_runner.py`` starts it; with the environment of :mod:`tests.support.interpreted` from the start, the tests
run without this detour. On a GPU nothing is interpreted: ``VLLM_USE_V2_MODEL_RUNNER=1 pytest tests/v2``.
"""

from __future__ import annotations

import pytest
import torch

from tests.support.interpreted import INTERPRETING, pretend_triton_runs

if INTERPRETING:
    pretend_triton_runs()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        elsewhere = not (INTERPRETING or torch.cuda.is_available())
        if "tests/v2/" in str(item.path) and elsewhere and item.path.name != "test_second_runner.py":
            item.add_marker(pytest.mark.skip(reason="test_second_runner.py runs it in a process of its own"))
