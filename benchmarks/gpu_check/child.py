"""The process of a session: runs its steps one after another, and stops after the first that fails."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
import traceback
from pathlib import Path

from gpu_check.check import Check, Engines
from gpu_check.plan import DRY, Sizes, steps_on
from gpu_check.record import Record


def main() -> int:
    """Run the named steps. A failed step may have broken the device's context, so this process stops after it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("steps", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--origin", type=float, required=True)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # steps inspect the engine
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if args.device == "cpu":
        # One thread, on any core: models are tiny, and threads that wait for each other are slow next to other work.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    known = {step.name: step for step in steps_on(args.device)}
    figures = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries log to standard output, which is for figures
    engines, sizes = Engines(), DRY if args.device == "cpu" else Sizes()
    for position, name in enumerate(args.steps):
        step = known[name]
        record = Record(args.out, name, args.origin, figures)
        record.event("started")
        started = time.time()
        until = started + step.seconds + step.start * (position == 0)
        try:
            module = importlib.import_module(f"gpu_check.steps.{step.module}")
            module.run(Check(step, args.device, sizes, args.out, record, engines, until))
        except BaseException as error:  # also pytest's exits: a step never ends the others
            traceback.print_exc()
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{last.filename}:{last.lineno}"
            record.event("failed", error=f"{type(error).__name__}: {str(error)[:2000]}", place=place)
            return 1
        record.event("done", seconds=round(time.time() - started, 1))
    engines.stop()
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # an engine that hangs in its shutdown must not take the next session's time
