"""``vllm-nld bench auto``: auto mode against plain AR and always-on self-speculation, over concurrency.

Every mode has its own engine. The engines take turns of half a second, so that changes in the machine's speed affect
all of them equally. A second AR engine is the control: its distance from the first is the error of measurement.
"""

from __future__ import annotations

import contextlib
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich.table import Table

from vllm_nld.checkpoints import checkpoint_path
from vllm_nld.checkpoints.held_out import held_out_prompts
from vllm_nld.cli.console import report_console
from vllm_nld.cli.engine import PROPOSER, engine_with, prepare_environment, stdout_to_stderr
from vllm_nld.cli.limits import DTYPES, MODEL_LENGTH, check_completions, one_of

ENGINES = {"ar": "ar", "self_speculation": "self_speculation", "auto": "auto", "control": "ar"}
WORKLOADS = ("code", "random", "mix")
TURN_SECONDS = 0.5
WARM_UP_TURNS = 6
"""Turns that are not counted, because kernels are compiled, and prices and acceptance are learned."""


@dataclass
class Job:
    """One request of a workload."""

    prompt: Any
    temperature: float
    tokens: int = 0


@dataclass
class Client:
    """Keeps requests with the same options in flight on one engine.

    Attributes:
        llm: the engine.
        options: options of every request, under ``nld``.
        jobs: taken in turn, forever, so that the batch is always full.
        clients: requests in flight.
    """

    llm: Any
    options: dict[str, Any]
    jobs: list[Job]
    clients: int
    _running: set[str] = field(default_factory=set)
    _number: int = 0

    def turn(self, seconds: float) -> tuple[int, float]:
        """Run for about ``seconds``; returns the tokens generated and the seconds taken."""
        core, tokens = self.llm.llm_engine, 0
        started = time.perf_counter()
        while time.perf_counter() - started < seconds:
            while len(self._running) < self.clients:
                self._add()
            for output in core.step():
                tokens += len(output.outputs[0].token_ids)
                if output.finished:
                    self._running.discard(output.request_id)
        return tokens, time.perf_counter() - started

    def _add(self) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        job, name = self.jobs[self._number % len(self.jobs)], f"{id(self)}-{self._number}"
        params = SamplingParams(
            temperature=job.temperature, max_tokens=job.tokens, ignore_eos=True, detokenize=False,
            extra_args={"nld": self.options}, output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        self.llm.llm_engine.add_request(name, job.prompt, params)
        self._running.add(name)
        self._number += 1

    def stop(self) -> None:
        """Abort the requests in flight."""
        self.llm.llm_engine.abort_request(list(self._running))
        while self.llm.llm_engine.has_unfinished_requests():
            self.llm.llm_engine.step()


def run(concurrency: list[int], workloads: list[str], turns: int, max_tokens: int, dtype: str, as_json: bool) -> None:
    """Measure every workload and concurrency; print a table or one JSON object.

    Raises:
        NLDError: a workload is unknown, or another option out of range.
    """
    for name in workloads:
        one_of("--workload", name, WORKLOADS)
    one_of("--dtype", dtype, DTYPES)
    check_jobs(max_tokens, max(concurrency))
    prepare_environment()
    with stdout_to_stderr():
        report = {
            "model": "tiny",
            "dtype": dtype,
            "max_tokens": max_tokens,
            "turns": turns,
            "results": _measure(concurrency, workloads, turns, max_tokens, dtype),
        }
    if as_json:
        print(json.dumps(report))
    else:
        _show(report)


def check_jobs(max_tokens: int, clients: int) -> None:
    """Refuse requests that the model has no room for. They ask for up to 1.5 times ``max_tokens``."""
    texts = [text for _, text in held_out_prompts(max(8, 2 * clients))]
    check_completions("1.5 times --max-tokens:", max_tokens * 3 // 2, texts)


def serving_settings(dtype: str, requests: int) -> dict[str, Any]:
    """Return the arguments of an engine for the embedded checkpoint that runs up to ``requests`` at once."""
    return {
        "model": str(checkpoint_path("tiny")),
        "dtype": dtype,
        "max_num_seqs": requests,
        "max_model_len": MODEL_LENGTH,
        "enable_prefix_caching": False,
        "speculative_config": {"model": PROPOSER},
    }


def _measure(
    concurrency: list[int], workloads: list[str], turns: int, max_tokens: int, dtype: str
) -> list[dict[str, Any]]:
    settings = serving_settings(dtype, max(concurrency))
    rows = []
    with contextlib.ExitStack() as stack:
        engines = {name: stack.enter_context(engine_with(**settings)) for name in ENGINES}
        for workload in workloads:
            for clients in concurrency:
                print(f"bench: {workload}, concurrency {clients} ...", file=sys.stderr, flush=True)
                jobs = make_jobs(workload, max(8, 2 * clients), max_tokens)
                rows.append(_compare(engines, workload, jobs, clients, turns))
    return rows


def _compare(engines: dict[str, Any], workload: str, jobs: list[Job], clients: int, turns: int) -> dict[str, Any]:
    runs = {name: Client(llm, {"mode": ENGINES[name]}, jobs, clients) for name, llm in engines.items()}
    before = _decisions(engines["auto"])
    turns_taken = take_turns(runs, turns)
    decisions = _decisions(engines["auto"]) - before
    return {
        "workload": workload,
        "concurrency": clients,
        "tokens_per_s": {name: round(speed(taken), 1) for name, taken in turns_taken.items()},
        "auto_to_better_fixed": round(auto_to_better(turns_taken, range(turns)), 3),
        "interval_95": bootstrap(turns_taken, turns),
        "control_to_ar": round(speed(turns_taken["control"]) / speed(turns_taken["ar"]), 3),
        "decisions": {f"{mode} {length}": n for (mode, length), n in sorted(decisions.items())},
    }


def take_turns(runs: dict[str, Client], turns: int) -> dict[str, list[tuple[int, float]]]:
    """Return tokens and seconds of every client's turns after the warm-up. The first client changes each turn."""
    taken: dict[str, list[tuple[int, float]]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(-WARM_UP_TURNS, turns):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            turn = runs[name].turn(TURN_SECONDS)
            if number >= 0:
                taken[name].append(turn)
    for client in runs.values():
        client.stop()
    return taken


def speed(taken: Sequence[tuple[int, float]]) -> float:
    """Tokens per second over some turns."""
    return sum(tokens for tokens, _ in taken) / sum(seconds for _, seconds in taken)


def auto_to_better(taken: dict[str, list[tuple[int, float]]], turns: Sequence[int]) -> float:
    """Auto's tokens per second divided by those of the better fixed mode, in the turns with these numbers.

    AR's speed is that of both its engines, so that one lucky engine does not raise the bar.
    """
    ar = speed([taken[name][turn] for name in ("ar", "control") for turn in turns])
    fixed = max(ar, speed([taken["self_speculation"][turn] for turn in turns]))
    return speed([taken["auto"][turn] for turn in turns]) / fixed


def bootstrap(taken: dict[str, list[tuple[int, float]]], turns: int) -> list[float]:
    """Return the 95 % interval of :func:`auto_to_better` over resampled turns."""
    return _interval(turns, lambda chosen: auto_to_better(taken, chosen))


def bootstrap_ratio(one: list[tuple[int, float]], other: list[tuple[int, float]]) -> list[float]:
    """Return the 95 % interval of the ratio of two engines' speeds over the same turns."""

    def ratio(turns: Sequence[int]) -> float:
        return speed([one[turn] for turn in turns]) / speed([other[turn] for turn in turns])

    return _interval(len(one), ratio)


def _interval(turns: int, statistic: Callable[[Sequence[int]], float], repeats: int = 1000) -> list[float]:
    generator = random.Random(0)
    cuts = statistics.quantiles([statistic(generator.choices(range(turns), k=turns)) for _ in range(repeats)], n=40)
    return [round(cuts[0], 3), round(cuts[-1], 3)]


def make_jobs(workload: str, count: int, tokens: int) -> list[Job]:
    """Return requests: held-out code completed greedily, random tokens sampled at temperature 1, or both in turn.

    They ask for 0.5 to 1.5 times ``tokens``, because real requests differ. With one length for all, AR would run in
    lockstep and prefill a whole batch at once. No server sees that, and no other mode can do it.
    """
    code = [Job(text, 0.0) for _, text in held_out_prompts(count)]
    generator = random.Random(0)
    noise = [Job({"prompt_token_ids": [generator.randrange(20, 500) for _ in range(150)]}, 1.0) for _ in range(count)]
    mix = [pair[index % 2] for index, pair in enumerate(zip(code, noise, strict=True))]
    jobs = {"code": code, "random": noise, "mix": mix}[workload]
    return [replace(job, tokens=generator.randrange(tokens // 2, tokens + tokens // 2)) for job in jobs]


def _decisions(llm: Any) -> Counter[tuple[str, int]]:
    """Return what auto mode has chosen so far, in an in-process engine."""
    core = llm.llm_engine.engine_core.engine_core
    counts: Counter[tuple[str, int]] = core.model_executor.driver_worker.worker.model_runner.drafter.auto.decisions
    return counts.copy()


def _show(report: dict[str, Any]) -> None:
    columns = ("workload", "concurrency", "AR tokens/s", "self-spec.", "auto", "auto / better", "95 %", "control / AR")
    table = Table(*columns)
    for row in report["results"]:
        speeds = [f"{row['tokens_per_s'][name]:.0f}" for name in ("ar", "self_speculation", "auto")]
        low, high = row["interval_95"]
        ratios = [f"{row['auto_to_better_fixed']:.3f}", f"{low:.3f} to {high:.3f}", f"{row['control_to_ar']:.3f}"]
        table.add_row(row["workload"], str(row["concurrency"]), *speeds, *ratios)
    console = report_console()
    console.print(table)
    console.print(f"{report['turns']} turns of {TURN_SECONDS} s each, tiny checkpoint, {report['dtype']}", style="dim")
