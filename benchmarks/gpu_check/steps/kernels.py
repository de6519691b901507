"""The operators' tests on the device: CUDA and Triton kernels compared with float64."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from gpu_check.build import ROOT
from gpu_check.check import Check

GPU_FILES = (
    "gpu/test_cuda_kernels.py",
    "kernels/test_operators.py",
    "kernels/test_triton.py",
    "kernels/test_xformers.py",
)
DRY_FILES = ("gpu", "kernels/test_operators.py")
EVERY = 100
"""Tests between two figures of the number that passed."""


def run(check: Check) -> None:
    """Run them, in several processes if pytest can.

    Raises:
        AssertionError: a test failed, or none ran.
    """
    if check.dry:
        run_tests(check, DRY_FILES, ["-k", check.sizes.cases])
    else:
        workers = ["-n", str(min(12, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
        run_tests(check, GPU_FILES, ["-k", "cuda", *workers])


def run_tests(check: Check, files: tuple[str, ...], options: list[str]) -> None:
    """Run tests of this repository, with a figure for each that fails.

    Raises:
        AssertionError: a test failed, or none ran.
    """
    import pytest

    results = Results(check)
    # The package under test is the checkout, from any working directory.
    os.chdir(ROOT)
    status = pytest.main([*(f"tests/{name}" for name in files), "-q", "-p", "no:cacheprovider", *options], [results])
    results.report()
    assert int(status) in (0, 5), f"pytest ended with status {int(status)}"
    assert check.dry or results.counts["passed"], "no test ran"


class Results:
    """A pytest plugin that counts, and reports failures at once."""

    def __init__(self, check: Check) -> None:
        self.check = check
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Record the outcome of a test's call, or of its fixtures if they failed or skipped."""
        if report.when != "call" and report.outcome == "passed":
            return
        self.counts[report.outcome] += 1
        if report.outcome == "failed":
            text = str(getattr(getattr(report.longrepr, "reprcrash", None), "message", report.longrepr))
            self.check.figure("failed", report.nodeid, why=text[-400:])
        elif sum(self.counts.values()) % EVERY == 0:
            self.check.figure("tests so far", sum(self.counts.values()))

    def report(self) -> None:
        """Write the counts."""
        for outcome, count in self.counts.items():
            self.check.figure("tests", count, outcome=outcome)
