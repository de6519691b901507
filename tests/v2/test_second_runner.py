"""Starts this tier in a process whose environment is the second runner's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.interpreted import ENVIRONMENT, INTERPRETING


@pytest.mark.skipif(INTERPRETING, reason="this process interprets")
@pytest.mark.timeout(1800)  # the whole tier: about two minutes of a quiet core
def test_in_a_process_that_interprets() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).parent)]
    found = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
    print(found.stdout, found.stderr)
    assert found.returncode == 0
    assert " passed" in found.stdout
