"""accept_prefix on the CPU: C++ compared with PyTorch, medians of one run.

python benchmarks/accept_prefix.py --json results.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from attention import medians
from rich.console import Console
from rich.table import Table

from vllm_nld.ops import cpp_ops, torch_ops


def acceptance(rows: int, length: int, seconds: float) -> dict[str, Any]:
    """Rows of ``length - 1`` drafts, of which a random number is right."""
    generator = torch.Generator().manual_seed(0)
    drafts = torch.randint(0, 1000, (rows, length - 1), generator=generator)
    wrong = torch.rand(rows, length - 1, generator=generator) < 0.15
    targets = torch.cat((torch.where(wrong, 0, drafts), torch.ones(rows, 1, dtype=torch.int64)), 1)
    arguments = drafts.flatten(), targets.flatten(), torch.arange(rows + 1, dtype=torch.int32) * (length - 1)
    for ours, theirs in zip(cpp_ops.accept_prefix(*arguments), torch_ops.accept_prefix(*arguments), strict=True):
        assert torch.equal(ours, theirs), "an implementation is wrong"
    times = medians(
        {
            "ours": lambda: cpp_ops.accept_prefix(*arguments),
            "torch": lambda: torch_ops.accept_prefix(*arguments),
        },
        seconds,
    )
    return {"operator": "accept_prefix", "rows": rows, "length": length, **result(times)}


def result(times: dict[str, float]) -> dict[str, Any]:
    """Microseconds and ratio."""
    return {
        "us": {name: round(value * 1e6, 1) for name, value in times.items()},
        "torch_to_ours": round(times["torch"] / times["ours"], 2),
    }


def main() -> None:
    """Measure every combination."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--length", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--seconds", type=float, default=0.5, help="per point")
    parser.add_argument("--json", type=Path, help="write the report here")
    args = parser.parse_args()
    reason = cpp_ops.unavailable(torch.device("cpu"))
    if reason:
        parser.error(f"the C++ operators are not available: {reason}")
    results = [acceptance(rows, length, args.seconds) for rows in args.rows for length in args.length]
    if args.json:
        args.json.write_text(json.dumps({"results": results}, indent=1) + "\n")
    table = Table("operator", "rows", "L", "ours us", "PyTorch us", "PyTorch / ours")
    for row in results:
        table.add_row(
            row["operator"], str(row["rows"]), str(row["length"]), str(row["us"]["ours"]), str(row["us"]["torch"]),
            str(row["torch_to_ours"]),
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
