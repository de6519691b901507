"""Host time of this package's own code in a step, by mode: what a change of the proposer must not make slower.

    python benchmarks/host_time.py                        # medians, in microseconds
    python benchmarks/host_time.py --against ../other     # another checkout in turns with this one, and ratios

``proposer`` is what ``SelfSpeculation.propose`` takes without the draft pass, ``draft pass`` what that takes besides
the model's forwards. Everything else in a step belongs to vLLM or to the model. Times are CPU times of the thread, so
that other processes matter little. A step of diffusion runs one forward or several: its mean says more than its median.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from time import thread_time
from types import SimpleNamespace
from unittest import mock

MODES = ("ar", "self_speculation", "diffusion", "auto")
PARTS = ("proposer", "draft pass")
HERE = Path(__file__).resolve()


def measure(requests: int, steps: int, modes: list[str]) -> dict[str, dict[str, float]]:
    """Return microseconds by mode and part: medians over the steps of one engine, all requests decoding."""
    from vllm_nld.checkpoints import checkpoint_path
    from vllm_nld.cli import stopwatch
    from vllm_nld.cli.bench_cycle import time_decoding
    from vllm_nld.cli.engine import PROPOSER, engine_with, prepare_environment

    prepare_environment()
    drafts, found = 15, {}
    with engine_with(
        model=str(checkpoint_path("tiny")),
        dtype="float32",
        max_model_len=2048,
        max_num_seqs=requests,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        speculative_config={"model": PROPOSER, "num_speculative_tokens": drafts},
    ) as llm:
        for mode in modes:
            asked = {"extra_args": {"nld": {"mode": mode}}}
            time_decoding(llm, requests, 30, 5, drafts, **asked)
            clock = mock.patch.object(stopwatch, "time", SimpleNamespace(perf_counter=thread_time))
            with clock, stopwatch.Stopwatch(llm) as watch:
                time_decoding(llm, requests, 30, steps, drafts, watch, **asked)
            parts = {part: [step.get(part, 0.0) * 1e6 for step in watch.steps] for part in PARTS}
            both = [sum(step) for step in zip(*parts.values(), strict=True)]
            found[mode] = {part: statistics.median(times) for part, times in (parts | {"both": both}).items()}
            found[mode]["mean"] = statistics.mean(both)
    return found


def elsewhere(checkout: Path, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Measure the package of a checkout in a process of its own."""
    command = [sys.executable, str(HERE), "--json", "--requests", str(options.requests), "--steps", str(options.steps)]
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--modes", *options.modes],
        env=environment,
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{checkout}: {done.stderr[-2000:]}")
    found: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(options: argparse.Namespace) -> None:
    """Print both packages' medians over the turns, and this one's time in the other's."""
    this, other = HERE.parents[1], options.against.resolve()
    turns = [(elsewhere(other, options), elsewhere(this, options)) for _ in range(options.turns)]
    print(f"{'mode':18} {'part':12} {'other us':>9} {'this us':>9} {'ratio':>6}  by turn")
    for mode in options.modes:
        for part in (*PARTS, "both", "mean"):
            before, after = ([turn[side][mode][part] for turn in turns] for side in (0, 1))
            ratios = " ".join(f"{b / a:.2f}" if a else "-" for a, b in zip(before, after, strict=True))
            old, new = statistics.median(before), statistics.median(after)
            print(f"{mode:18} {part:12} {old:9.0f} {new:9.0f} {new / old if old else 1:6.2f}  {ratios}", flush=True)


def main() -> None:
    """Read the options and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.against is not None:
        compare(options)
        return
    found = measure(options.requests, options.steps, options.modes)
    if options.json:
        print(json.dumps(found))
        return
    for mode, parts in found.items():
        print(f"{mode:18}", ", ".join(f"{part} {microseconds:.0f} us" for part, microseconds in parts.items()))


if __name__ == "__main__":
    main()
