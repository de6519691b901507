"""A run's figures as Markdown: ``PYTHONPATH=benchmarks python -m gpu_check.report FOLDER`` (docs/developer/gpu.md)."""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from gpu_check.record import read

OWN = {"at", "step", "figure", "value", "unit"}
"""Keys of a figure's line that do not describe the measured point."""


def markdown(folder: Path) -> str:
    """Return a table for every step, and its outcome."""
    parts, found = [], read(folder)
    order = list(dict.fromkeys(line["step"] for line in found))
    lines = sorted(found, key=lambda line: order.index(line["step"]))
    for step, group in groupby(lines, lambda line: str(line["step"])):
        own = list(group)
        parts.append(f"### {step}\n")
        figures = [_row(line) for line in own if "figure" in line]
        if figures:
            parts.append("\n".join(["| figure | where | value |", "|---|---|---|", *figures]) + "\n")
        parts += [f"{step}: {_event(line)}\n" for line in own if line.get("event", "started") != "started"]
    return "\n".join(parts)


def _row(line: dict[str, Any]) -> str:
    where = ", ".join(f"{key} {value}" for key, value in line.items() if key not in OWN)
    value = f"{line['value']} {line['unit']}".strip().replace("|", "/").replace("\n", " ")
    return f"| {line['figure']} | {where} | {value} |"


def _event(line: dict[str, Any]) -> str:
    what = [str(value) for key, value in line.items() if key not in OWN | {"event"}]
    return ", ".join([str(line["event"]), *what])


if __name__ == "__main__":
    print(markdown(Path(sys.argv[1])))
