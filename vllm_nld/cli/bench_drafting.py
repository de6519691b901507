"""``vllm-nld bench drafting``: the gain from draft adapter, block length and drawn drafts on held-out text.

Three tables: (1) acceptance by position, tokens per forward and agreement with AR, one request at a time; (2) speed of
the lengths that auto mode chooses against fixed lengths, on a mix of easy and hard requests, with engines that take
turns; (3) acceptance of sampled requests.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from vllm_nld.checkpoints import checkpoint_path
from vllm_nld.checkpoints.held_out import held_out_prompts
from vllm_nld.cli.bench_auto import Client, bootstrap_ratio, check_jobs, make_jobs, serving_settings, speed, take_turns
from vllm_nld.cli.console import report_console
from vllm_nld.cli.engine import PROPOSER, engine, engine_with, prepare_environment, stdout_to_stderr
from vllm_nld.cli.limits import check_completions
from vllm_nld.serving.ledger import Tally

LENGTHS: tuple[int, ...] = (4, 8, 16)
"""The embedded checkpoint was trained for blocks of 16; longer ones are refused."""
TEMPERATURES = (0.7, 1.0)
PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos"


def ways(lookup: bool = True) -> dict[str, dict[str, Any]]:
    """Return the block lengths to compare: a name, and a request's options."""
    drafting: dict[str, Any] = {"mode": "self_speculation"} | ({} if lookup else {"prompt_lookup": 0})
    fixed = {f"fixed {length}": drafting | {"block_length": length} for length in LENGTHS}
    return fixed | {"auto": drafting | {"mode": "auto"}}


def run(prompts: int, max_tokens: int, concurrency: list[int], turns: int, as_json: bool) -> None:
    """Measure all three; print tables or one JSON object.

    Raises:
        NLDError: an option is out of range.
    """
    texts = [text for _, text in held_out_prompts(prompts)]
    check_completions("--max-tokens", max_tokens, texts)
    check_jobs(max_tokens, max(concurrency))
    prepare_environment()
    with stdout_to_stderr():
        report = {
            "model": "tiny",
            "prompts": prompts,
            "max_tokens": max_tokens,
            "turns": turns,
            "greedy": _greedy(texts, max_tokens),
            "speed": _speed(concurrency, turns, max_tokens),
            "sampled": _sampled(texts, max_tokens),
        }
    if as_json:
        print(json.dumps(report))
    else:
        _show(report)


@dataclass
class Run:
    """Cost and yield of some requests, filled in when they have ended."""

    tally: Tally
    by_position: list[int]
    seconds: float = 0.0

    @property
    def blocks(self) -> int:
        return self.tally.blocks["self_speculation"]


@contextlib.contextmanager
def watched(llm: Any) -> Iterator[Run]:
    """Count what an engine does within the ``with`` block."""

    def positions() -> list[int]:
        found = [metric.values for metric in llm.get_metrics() if metric.name == PER_POSITION]
        return list(found[0]) if found else []

    tally, before, started = llm.collective_rpc("nld_tally")[0], positions(), time.perf_counter()
    result = Run(Tally(), [])
    yield result
    result.seconds = time.perf_counter() - started
    result.tally = Tally.between(tally, llm.collective_rpc("nld_tally")[0])
    before = before or [0] * len(positions())
    result.by_position = [now - then for now, then in zip(positions(), before, strict=True)]


def _greedy(texts: list[str], max_tokens: int) -> list[dict[str, Any]]:
    """Return a row per adapter, lookup and way, one request at a time: acceptance, tokens per forward, agreement."""
    from vllm import SamplingParams

    def complete(llm: Any, options: dict[str, Any]) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, extra_args={"nld": options})
        return [list(llm.generate(text, params, use_tqdm=False)[0].outputs[0].token_ids) for text in texts]

    rows = []
    with engine(str(checkpoint_path("tiny")), drafts=0, dtype="float32") as llm:
        expected = complete(llm, {"mode": "ar"})
        for adapter, lookup in ((False, False), (True, False), (True, True)):
            for name, options in ways(lookup).items():
                _say(f"greedy, {'adapter' if adapter else 'no adapter'}, lookup {lookup}, {name}")
                if name == "auto":
                    complete(llm, options | {"draft_adapter": adapter})  # prices settle
                with watched(llm) as run:
                    tokens = complete(llm, options | {"draft_adapter": adapter})
                row = {"adapter": adapter, "prompt_lookup": lookup, "way": name}
                rows.append(row | _summary(run, tokens, expected))
    return rows


def _summary(run: Run, tokens: list[list[int]], expected: list[list[int]]) -> dict[str, Any]:
    generated = sum(map(len, tokens))
    forwards = sum(count for kind, count in run.tally.forwards.items() if kind != "prefill")
    return {
        "acceptance_length": round(run.tally.acceptance_length() or 1.0, 3),
        "accepted_by_position": [round(count / run.blocks, 3) for count in run.by_position],
        "tpf": round(generated / forwards, 3),
        "tokens_per_s": round(generated / run.seconds, 1),
        "same_text_as_ar": sum(a == b for a, b in zip(tokens, expected, strict=True)) / len(expected),
    }


def _speed(concurrency: list[int], turns: int, max_tokens: int) -> list[dict[str, Any]]:
    """Return tokens per second of every way on the mix, and auto against the best fixed length."""
    settings = serving_settings("bfloat16", max(concurrency))
    rows = []
    with contextlib.ExitStack() as stack:
        engines = {name: stack.enter_context(engine_with(**settings)) for name in ways()}
        for clients in concurrency:
            _say(f"speed, mix, concurrency {clients}")
            jobs = make_jobs("mix", max(8, 2 * clients), max_tokens)
            runs = {name: Client(llm, ways()[name], jobs, clients) for name, llm in engines.items()}
            taken = take_turns(runs, turns)
            best = max((name for name in runs if name != "auto"), key=lambda name: speed(taken[name]))
            rows.append(
                {
                    "concurrency": clients,
                    "tokens_per_s": {name: round(speed(own), 1) for name, own in taken.items()},
                    "best_fixed": best,
                    "auto_to_best_fixed": round(speed(taken["auto"]) / speed(taken[best]), 3),
                    "interval_95": bootstrap_ratio(taken["auto"], taken[best]),
                }
            )
    return rows


def _sampled(texts: list[str], max_tokens: int) -> list[dict[str, Any]]:
    """Return the acceptance length of sampled requests, by temperature and way of drafting."""
    from vllm import SamplingParams

    rows = []
    settings = {"model": str(checkpoint_path("tiny")), "dtype": "float32", "max_num_seqs": 16}
    with engine_with(**settings, speculative_config={"model": PROPOSER}) as llm:
        for temperature in TEMPERATURES:
            for drawn in (False, True):
                _say(f"sampled, temperature {temperature}, {'drawn' if drawn else 'most probable'} drafts")
                options = {"mode": "self_speculation", "sampled_drafts": drawn, "prompt_lookup": 0}
                params = SamplingParams(
                    temperature=temperature, max_tokens=max_tokens, ignore_eos=True, n=4, extra_args={"nld": options}
                )
                with watched(llm) as run:
                    llm.generate(texts, params, use_tqdm=False)
                rows.append(
                    {
                        "temperature": temperature,
                        "drawn_drafts": drawn,
                        "acceptance_length": round(run.tally.acceptance_length() or 1.0, 3),
                        "accepted_by_position": [round(count / run.blocks, 3) for count in run.by_position],
                        "blocks": run.blocks,
                    }
                )
    return rows


def _say(what: str) -> None:
    print(f"bench: {what} ...", file=sys.stderr, flush=True)


def _show(report: dict[str, Any]) -> None:
    console = report_console()
    table = Table(
        "adapter", "lookup", "block length", "acceptance length", "TPF", "tokens/s", "same text as AR", "by position"
    )
    for row in report["greedy"]:
        table.add_row(
            _yes(row["adapter"]), _yes(row["prompt_lookup"]), row["way"], f"{row['acceptance_length']:.2f}",
            f"{row['tpf']:.2f}", f"{row['tokens_per_s']:.0f}", f"{row['same_text_as_ar']:.0%}", _positions(row),
        )  # fmt: skip
    console.print(table)
    table = Table("concurrency", *(f"{name} tokens/s" for name in ways()), "auto / best fixed", "95 %")
    for row in report["speed"]:
        low, high = row["interval_95"]
        speeds = [f"{value:.0f}" for value in row["tokens_per_s"].values()]
        ratio = f"{row['auto_to_best_fixed']:.3f} ({row['best_fixed']})"
        table.add_row(str(row["concurrency"]), *speeds, ratio, f"{low:.3f} to {high:.3f}")
    console.print(table)
    table = Table("temperature", "drafts", "acceptance length", "by position")
    for row in report["sampled"]:
        drafts = "drawn" if row["drawn_drafts"] else "most probable"
        table.add_row(str(row["temperature"]), drafts, f"{row['acceptance_length']:.2f}", _positions(row))
    console.print(table)
    console.print(f"{report['prompts']} held-out prompts of {report['max_tokens']} tokens; TPF without the prefill")


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _positions(row: dict[str, Any]) -> str:
    return " ".join(f"{share:.2f}" for share in row["accepted_by_position"][:8])
