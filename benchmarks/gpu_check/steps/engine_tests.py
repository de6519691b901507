"""The tests that compare an engine on a GPU with the reference, eager and with CUDA graphs."""

from __future__ import annotations

from gpu_check.check import Check
from gpu_check.steps.kernels import run_tests


def run(check: Check) -> None:
    """Run them. In a dry run they are collected and skipped.

    Raises:
        AssertionError: a test failed, or none ran.
    """
    run_tests(check, ("gpu/test_gpu.py",), [])
