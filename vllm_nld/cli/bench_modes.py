"""``vllm-nld bench modes``: cost and yield of every mode on held-out text, one request at a time."""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

from rich.table import Table

from vllm_nld.checkpoints import checkpoint_path
from vllm_nld.checkpoints.held_out import held_out_prompts
from vllm_nld.cli import bench_parking
from vllm_nld.cli.console import report_console
from vllm_nld.cli.engine import PROPOSER, engine, engine_with, prepare_environment, stdout_to_stderr
from vllm_nld.cli.limits import DTYPES, check_completions, one_of
from vllm_nld.serving.ledger import Tally

CONVENTION = "tokens per decode forward (draft, verify, denoise and commit all count); the prefill is left out"
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
LEARNED_THRESHOLDS = (0.5, 0.7, 0.9)
SOL_BLOCK_LENGTHS = (8, 16, 32)


def settings() -> list[tuple[str, dict[str, Any]]]:
    """Return the rows of the table: a name, and the options under ``nld`` of a request."""
    rows: list[tuple[str, dict[str, Any]]] = [
        ("AR", {"mode": "ar"}),
        ("self-speculation", {"mode": "self_speculation"}),
        ("auto", {"mode": "auto"}),
    ]
    rows += [(f"diffusion {value}", {"mode": "diffusion", "threshold": value}) for value in THRESHOLDS]
    if (checkpoint_path("tiny") / "learned_sampler").is_dir():
        learned = {"mode": "diffusion", "sampler": "learned"}
        rows += [(f"learned sampler {value}", {**learned, "threshold": value}) for value in LEARNED_THRESHOLDS]
    return rows


def run(prompts: int, max_tokens: int, dtype: str, sol: bool, as_json: bool) -> None:
    """Measure every mode; print a table or one JSON object.

    Raises:
        NLDError: an option is out of range.
    """
    one_of("--dtype", dtype, DTYPES)
    texts = [text for _, text in held_out_prompts(prompts)]
    requests = len(bench_parking.THRESHOLDS) + bench_parking.AR_REQUESTS
    batch = [text for _, text in held_out_prompts(max(8, requests))]
    check_completions("--max-tokens", max_tokens, texts + batch)
    prepare_environment()
    with stdout_to_stderr():
        rows = _measure(texts, max_tokens, dtype)
        compaction = _compaction(batch[:8], max_tokens, dtype)
        parking = bench_parking.measure(batch[:requests], max_tokens, dtype)
        report = {
            "model": "tiny",
            "dtype": dtype,
            "prompts": prompts,
            "max_tokens": max_tokens,
            "tpf_convention": CONVENTION,
            "modes": rows,
            "compaction": compaction,
            "parking": parking,
            "speed_of_light": _speed_of_light(texts, max_tokens) if sol else [],
        }
    if as_json:
        print(json.dumps(report))
    else:
        _show(report)


def _measure(texts: list[str], max_tokens: int, dtype: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with engine(str(checkpoint_path("tiny")), drafts=0, dtype=dtype) as llm:
        expected: list[list[int]] = []
        for name, nld in settings():
            print(f"bench: {name} ...", file=sys.stderr, flush=True)
            row, tokens = _one_mode(llm, name, nld, texts, max_tokens)
            expected = expected or tokens  # AR comes first
            row["exact_match_with_ar"] = round(_share(a == b for a, b in zip(tokens, expected, strict=True)), 3)
            row["agreeing_prefix"] = round(_share(_agreement(*pair) for pair in zip(tokens, expected, strict=True)), 3)
            rows.append(row)
    return rows


def _one_mode(
    llm: Any, name: str, nld: dict[str, Any], texts: list[str], max_tokens: int
) -> tuple[dict[str, Any], list[list[int]]]:
    from vllm import SamplingParams

    def params(tokens: int) -> SamplingParams:
        return SamplingParams(temperature=0, max_tokens=tokens, extra_args={"nld": nld})

    llm.generate(texts[0], params(32), use_tqdm=False)  # warm up
    before = llm.collective_rpc("nld_tally")[0]
    started = time.perf_counter()
    tokens = [list(llm.generate(text, params(max_tokens), use_tqdm=False)[0].outputs[0].token_ids) for text in texts]
    seconds = time.perf_counter() - started
    tally = Tally.between(before, llm.collective_rpc("nld_tally")[0])
    generated = sum(map(len, tokens))
    forwards = sum(count for kind, count in tally.forwards.items() if kind != "prefill")
    row: dict[str, Any] = {
        "mode": name,
        "tpf": round(generated / forwards, 3),
        "tokens_per_s": round(generated / seconds, 1),
        "tokens": generated,
        "forwards": dict(tally.forwards),
    }
    acceptance, passes = tally.acceptance_length(), tally.passes_per_block()
    if acceptance is not None:
        row["acceptance_length"] = round(acceptance, 3)
    if passes is not None:
        row["denoising_passes_per_block"] = round(passes, 3)
    return row, tokens


def _compaction(texts: list[str], max_tokens: int, dtype: str, rounds: int = 3) -> dict[str, Any]:
    """Return what is saved when finished blocks leave the denoising forward, on a batch of diffusion requests."""
    from vllm import SamplingParams

    settings = {"model": str(checkpoint_path("tiny")), "dtype": dtype, "max_num_seqs": len(texts)}
    found: dict[bool, list[tuple[float, int]]] = {True: [], False: []}
    print("bench: compaction ...", file=sys.stderr, flush=True)
    with engine_with(**settings, speculative_config={"model": PROPOSER}) as llm:
        core = llm.llm_engine.engine_core.engine_core
        drafter = core.model_executor.driver_worker.worker.model_runner.drafter
        draft_pass, drafter.parks = drafter.draft_pass, False  # all blocks of a step are filled before it ends
        nld = {"mode": "diffusion", "threshold": 0.7}
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, extra_args={"nld": nld})
        llm.generate(texts, params, use_tqdm=False)  # warm up
        for turn in range(2 * rounds):
            draft_pass.compact = turn % 2 == 0
            blocks, started = draft_pass.block_forwards, time.perf_counter()
            llm.generate(texts, params, use_tqdm=False)
            found[draft_pass.compact].append((time.perf_counter() - started, draft_pass.block_forwards - blocks))
        draft_pass.compact = True
    seconds = {compact: statistics.median(s for s, _ in runs) for compact, runs in found.items()}
    return {
        "requests": len(texts),
        "threshold": 0.7,
        "block_forwards": found[True][0][1],
        "block_forwards_without": found[False][0][1],
        "speed_up": round(seconds[False] / seconds[True], 3),
    }


def _speed_of_light(texts: list[str], max_tokens: int) -> list[dict[str, Any]]:
    from vllm_nld.cli.sol import load, speed_of_light

    return speed_of_light(*load(checkpoint_path("tiny"), texts), max_tokens, SOL_BLOCK_LENGTHS)


def _share(values: Any) -> float:
    listed = list(values)
    return float(sum(listed)) / len(listed)


def _agreement(tokens: list[int], expected: list[int]) -> float:
    """Share of a text up to the first token that differs."""
    same = next((i for i, (a, b) in enumerate(zip(tokens, expected, strict=False)) if a != b), len(expected))
    return min(same, len(expected)) / len(expected)


def _show(report: dict[str, Any]) -> None:
    table = Table(
        "mode", "TPF", "acceptance length", "passes / block", "same text as AR", "agreeing prefix", "tokens/s"
    )
    for row in report["modes"]:
        table.add_row(
            row["mode"],
            f"{row['tpf']:.2f}",
            _cell(row.get("acceptance_length")),
            _cell(row.get("denoising_passes_per_block")),
            f"{row['exact_match_with_ar']:.0%}",
            f"{row['agreeing_prefix']:.0%}",
            f"{row['tokens_per_s']:.0f}",
        )
    for row in report["speed_of_light"]:
        table.add_row(f"speed of light, block {row['block_length']}", f"{row['tpf']:.2f}", "-", "-", "-", "-", "-")
    console = report_console()
    console.print(table)
    saved = report["compaction"]
    console.print(
        f"finished blocks leave the pass ({saved['requests']} diffusion requests, threshold {saved['threshold']}): "
        f"{saved['block_forwards']} block forwards instead of {saved['block_forwards_without']}, "
        f"{saved['speed_up']:.2f} times as fast"
    )
    for line in bench_parking.lines(report["parking"]):
        console.print(line)
    console.print(f"TPF: {CONVENTION}; {report['prompts']} held-out prompts, {report['dtype']}, one request at a time")


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
