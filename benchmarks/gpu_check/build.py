"""Builds the CUDA operators during the first step."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

from gpu_check.record import Record

ROOT = Path(__file__).parents[2]


class Build:
    """``scripts/build_cuda.sh`` for this machine's card.

    Args:
        record: gets the outcome.
        log: gets the compiler's output.
    """

    def __init__(self, record: Record, log: Path) -> None:
        self._record = record
        self._log = log
        self._started = time.time()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, if there is a compiler."""
        nvcc = os.environ.get("NVCC", "nvcc")
        if shutil.which(nvcc) is None:
            self._record.event("skipped", why=f"{nvcc} is not there: set NVCC or PATH")
            return
        architecture = os.environ.get("ARCHS") or card("compute_cap").replace(".", "")
        environment = {**os.environ, "ARCHS": architecture, "THREADS": "0"}
        self._record.event("started", archs=architecture)
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                [ROOT / "scripts" / "build_cuda.sh"], stdout=output, stderr=output, env=environment
            )

    def wait(self, seconds: float) -> None:
        """Wait for it, and end it if it takes longer, so that all later steps run with the same library."""
        if self._process is None:
            return
        try:
            status = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            self._record.event("cut", why=f"not built after {time.time() - self._started:.0f} s")
        else:
            event = "done" if status == 0 else "failed"
            self._record.event(event, status=status, seconds=round(time.time() - self._started, 1), log=self._log.name)
        self._process = None


def card(query: str) -> str:
    """Ask nvidia-smi about the first card; returns "" without an answer."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip().split("\n")[0]
