"""Figures, printed and written at once, so that a run that is cut keeps its figures."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, TextIO

FILE = "gpu_check.jsonl"
"""One JSON object a line: a figure (``step, figure, value, unit`` and where it was measured) or an event of a step."""


class Record:
    """Appends to the file of a run.

    Args:
        folder: where the file is.
        step: the step that writes.
        origin: ``time.time()`` when the run began; every line has the seconds since then.
        out: where it prints; standard output by default.
    """

    def __init__(self, folder: Path, step: str, origin: float, out: TextIO | None = None) -> None:
        self.path = folder / FILE
        self.step = step
        self.origin = origin
        self.out = out

    def figure(self, name: str, value: Any, unit: str = "", **where: Any) -> None:
        """Print and write one figure.

        Args:
            name: what was measured.
            value: a number, or a word.
            unit: unit of a number.
            where: the measured point: requests, tokens, an implementation.
        """
        if isinstance(value, float):
            value = float(f"{value:.5g}")
        at = ", ".join(f"{key} {found}" for key, found in where.items())
        self._say(f"{name}{f' ({at})' if at else ''} = {value} {unit}")
        self._write({"figure": name, "value": value, "unit": unit, **where})

    def event(self, name: str, **what: Any) -> None:
        """Print and write the outcome of a step."""
        self._say(" ".join([name, *(f"{key}={found}" for key, found in what.items())]))
        self._write({"event": name, **what})

    def _say(self, text: str) -> None:
        print(f"[{time.time() - self.origin:6.1f} s] {self.step:>12}  {text.rstrip()}", file=self.out, flush=True)

    def _write(self, what: dict[str, Any]) -> None:
        line = {"at": round(time.time() - self.origin, 1), "step": self.step, **what}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run so far, without a line that is being written."""
    path = folder / FILE
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def value(folder: Path, step: str, figure: str, **where: Any) -> Any:
    """Return the last figure of that name, step and place, or None."""
    wanted = {"step": step, "figure": figure, **where}
    found = [line["value"] for line in read(folder) if wanted.items() <= line.items()]
    return found[-1] if found else None
