"""Triton's kernels on CPU, through its interpreter, in a separate process.

Triton decides whether it is interpreted when it is imported, and in a run of several tiers vLLM has imported it long
before these tests. With TRITON_INTERPRET=1 in the environment from the start, the tests run without this detour.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.implementations import INTERPRETING


@pytest.mark.skipif(INTERPRETING, reason="this process interprets")
def test_operators_in_an_interpreting_process() -> None:
    pytest.importorskip("triton")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-k",
        "triton",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).parent),
    ]
    found = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    print(found.stdout, found.stderr)
    assert found.returncode == 0
    assert " passed" in found.stdout and "triton-cpu" in found.stdout
