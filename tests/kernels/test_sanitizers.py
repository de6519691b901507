"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, without torch (``csrc/tests``)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("c++")), reason="needs cmake and a C++ compiler")
def test_kernels_run_clean(tmp_path: Path) -> None:
    # vLLM, once imported, preloads libraries into every child; the sanitizer must come first.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}

    def run(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    run("cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DVLLM_NLD_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=None")
    run("cmake", "--build", str(tmp_path), "--parallel", "2")
    printed = run(str(tmp_path / "kernel_tests"), "12")
    assert "portable: 12 cases" in printed
    assert "0 failures" in printed
