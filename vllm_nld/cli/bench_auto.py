"""``vllm-nld bench auto``: auto mode against plain AR and always-on self-speculation, over concurrency.

One engine serves all three, and their runs alternate, so that a noisy machine harms all alike: read the ratios.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_nld.checkpoints import checkpoint_path
from vllm_nld.checkpoints.held_out import held_out_prompts
from vllm_nld.cli.engine import PROPOSER, engine_with, prepare_environment, stdout_to_stderr
from vllm_nld.errors import NLDError

MODES = ("ar", "self_speculation", "auto")
WORKLOADS = ("code", "random", "mix")


@dataclass
class Job:
    """One request of a workload."""

    prompt: Any
    temperature: float
    tokens: int = 0


def run(concurrency: list[int], workloads: list[str], rounds: int, max_tokens: int, dtype: str, as_json: bool) -> None:
    """Measure every workload and concurrency; print a table or one JSON object.

    Raises:
        NLDError: a workload is unknown.
    """
    for name in workloads:
        if name not in WORKLOADS:
            raise NLDError(f"--workload {name}: allowed are {', '.join(WORKLOADS)}")
    prepare_environment()
    with stdout_to_stderr():
        report = {
            "model": "tiny",
            "dtype": dtype,
            "max_tokens": max_tokens,
            "rounds": rounds,
            "results": _measure(concurrency, workloads, rounds, max_tokens, dtype),
        }
    if as_json:
        print(json.dumps(report))
    else:
        _show(report)


def _measure(
    concurrency: list[int], workloads: list[str], rounds: int, max_tokens: int, dtype: str
) -> list[dict[str, Any]]:
    settings = {
        "model": str(checkpoint_path("tiny")),
        "dtype": dtype,
        "max_num_seqs": max(concurrency),
        "max_model_len": 2048,
        "enable_prefix_caching": False,
        "speculative_config": {"model": PROPOSER},
    }
    rows = []
    with engine_with(**settings) as llm:
        for workload in workloads:
            for clients in concurrency:
                print(f"bench: {workload}, concurrency {clients} ...", file=sys.stderr, flush=True)
                rows.append(_compare(llm, workload, clients, rounds, max_tokens))
    return rows


def _compare(llm: Any, workload: str, clients: int, rounds: int, max_tokens: int) -> dict[str, Any]:
    jobs = make_jobs(workload, max(8, 2 * clients), max_tokens)
    speeds: dict[str, list[float]] = {mode: [] for mode in MODES}
    before = _decisions(llm)
    for mode in MODES:
        serve(llm, jobs, mode, clients)  # warm up: shapes, prices, acceptance
    for turn in range(rounds):
        for mode in (*MODES[turn % 3 :], *MODES[: turn % 3]):
            tokens, seconds = serve(llm, jobs, mode, clients)
            speeds[mode].append(tokens / seconds)
    better = [max(pair) for pair in zip(speeds["ar"], speeds["self_speculation"], strict=True)]
    ratios = [auto / fixed for auto, fixed in zip(speeds["auto"], better, strict=True)]
    medians = {mode: statistics.median(values) for mode, values in speeds.items()}
    fixed = max(medians["ar"], medians["self_speculation"])
    return {
        "workload": workload,
        "concurrency": clients,
        "tokens_per_s": {mode: round(value, 1) for mode, value in medians.items()},
        "auto_to_better_fixed": round(medians["auto"] / fixed, 3),
        "auto_to_better_fixed_per_round": round(statistics.median(ratios), 3),
        "decisions": {f"{mode} {length}": n for (mode, length), n in sorted((_decisions(llm) - before).items())},
    }


def make_jobs(workload: str, count: int, tokens: int) -> list[Job]:
    """Return requests: held-out code completed greedily, random tokens sampled at temperature 1, or both in turn.

    They ask for half of ``tokens`` to one and a half times as many, as real ones differ: with one length for all, AR
    would run in lockstep and prefill a whole batch at once, which no server sees and no other mode can.
    """
    code = [Job(text, 0.0) for _, text in held_out_prompts(count)]
    generator = random.Random(0)
    noise = [Job({"prompt_token_ids": [generator.randrange(20, 500) for _ in range(150)]}, 1.0) for _ in range(count)]
    mix = [pair[index % 2] for index, pair in enumerate(zip(code, noise, strict=True))]
    jobs = {"code": code, "random": noise, "mix": mix}[workload]
    return [replace(job, tokens=generator.randrange(tokens // 2, tokens + tokens // 2)) for job in jobs]


def serve(llm: Any, jobs: list[Job], mode: str, clients: int) -> tuple[int, float]:
    """Keep ``clients`` requests in flight until as many tokens are generated as the jobs ask for, each taken once.

    Jobs come round again, and what runs at the end is cut off: with a fixed set of requests the last and slowest one
    would decide, while nothing else runs. Returns generated tokens and seconds.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    core, tokens, number, wanted = llm.llm_engine, 0, 0, sum(job.tokens for job in jobs)
    running: set[str] = set()
    started = time.perf_counter()
    while tokens < wanted:
        while len(running) < clients:
            job, name = jobs[number % len(jobs)], f"{mode}-{started}-{number}"
            params = SamplingParams(
                temperature=job.temperature, max_tokens=job.tokens, ignore_eos=True, detokenize=False,
                extra_args={"nld": {"mode": mode}}, output_kind=RequestOutputKind.DELTA,
            )  # fmt: skip
            core.add_request(name, job.prompt, params)
            running.add(name)
            number += 1
        for output in core.step():
            tokens += len(output.outputs[0].token_ids)
            if output.finished:
                running.discard(output.request_id)
    seconds = time.perf_counter() - started
    core.abort_request(list(running))
    while core.has_unfinished_requests():
        core.step()
    return tokens, seconds


def _decisions(llm: Any) -> Counter[tuple[str, int]]:
    """Return what auto mode has chosen so far, in an in-process engine."""
    core = llm.llm_engine.engine_core.engine_core
    counts: Counter[tuple[str, int]] = core.model_executor.driver_worker.worker.model_runner.drafter.auto.decisions
    return counts.copy()


def _show(report: dict[str, Any]) -> None:
    table = Table("workload", "concurrency", "AR tokens/s", "self-speculation", "auto", "auto / better fixed")
    for row in report["results"]:
        speeds = [f"{row['tokens_per_s'][mode]:.0f}" for mode in MODES]
        table.add_row(row["workload"], str(row["concurrency"]), *speeds, f"{row['auto_to_better_fixed']:.3f}")
    console = Console()
    console.print(table)
    console.print(f"medians of {report['rounds']} alternating runs, tiny checkpoint, {report['dtype']}", style="dim")
