"""Starts this tier in a process whose environment is the second runner's, and stays in the time that it may take."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.interpreted import ENVIRONMENT, INTERPRETING

MOST_SECONDS = 300
"""On two slow cores that do nothing else."""


@pytest.mark.skipif(INTERPRETING, reason="this process interprets")
def test_in_a_process_that_interprets() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).parent)]
    started = time.monotonic()
    found = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
    print(found.stdout, found.stderr)
    assert found.returncode == 0
    assert " passed" in found.stdout
    if os.getloadavg()[0] < 3:
        assert time.monotonic() - started < MOST_SECONDS
