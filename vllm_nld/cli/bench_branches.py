"""``vllm-nld bench branches``: what branches and quadratic self-speculation gain and cost in the engine.

One request at a time. AR is plain vLLM, without this extension's speculation, eager like the other engine. The ways
take turns, prompt by prompt, so that a machine's changing speed meets all of them.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from vllm_nld.checkpoints import checkpoint_path
from vllm_nld.checkpoints.held_out import held_out_prompts
from vllm_nld.cli.console import report_console
from vllm_nld.cli.engine import engine, prepare_environment, stdout_to_stderr
from vllm_nld.cli.limits import DTYPES, MODEL_LENGTH, check_completions, one_of
from vllm_nld.serving.ledger import Tally

FORWARD_SIZES = (1, 8, 16, 32, 64, 128, 256)


AR = "AR (plain vLLM)"


def ways(blocks: list[int]) -> dict[str, dict[str, Any]]:
    """Return what is compared with AR: a name, and a request's options."""
    found: dict[str, dict[str, Any]] = {}
    for block in blocks:
        drafting = {"mode": "self_speculation", "block_length": block, "prompt_lookup": 0}
        found[f"linear, block {block}"] = drafting
        for count in (1, 2, 4, 8):
            found[f"{count} branches, block {block}"] = drafting | {"branches": count}
        found[f"branches by price, block {block}"] = drafting | {"branches": "auto"}
        found[f"quadratic, block {block}"] = drafting | {"branches": "all"}
    return found


@dataclass
class Run:
    """What one way has done so far.

    Attributes:
        texts: token ids, by prompt.
        seconds: that they took.
        tally: of what; empty for plain vLLM, whose forwards give one token each.
    """

    texts: list[list[int]] = field(default_factory=list)
    seconds: float = 0.0
    tally: Tally = field(default_factory=Tally)


def run(model: str, blocks: list[int], prompts: int, max_tokens: int, dtype: str, as_json: bool) -> None:
    """Measure every way; print a table or one JSON object.

    Raises:
        NLDError: an option is out of range.
    """
    one_of("--dtype", dtype, DTYPES)
    texts = [text for _, text in held_out_prompts(prompts)]
    check_completions("--max-tokens", max_tokens, texts)
    prepare_environment()
    folder = str(checkpoint_path(model))
    # The small cache has no room for smollm2's own length.
    settings: dict[str, Any] = {"dtype": dtype, "max_model_len": MODEL_LENGTH}
    with (
        stdout_to_stderr(),
        engine(folder, **settings) as plain,
        engine(folder, drafts=max(blocks) - 1, **settings) as llm,
    ):
        costs = _forward_costs(llm)
        rows = _rows(_take_turns(plain, llm, ways(blocks), texts, max_tokens))
    report = {
        "model": model,
        "dtype": dtype,
        "prompts": prompts,
        "max_tokens": max_tokens,
        "forward": costs,
        "ways": rows,
    }
    if as_json:
        print(json.dumps(report))
    else:
        _show(report)


def _forward_costs(llm: Any) -> dict[str, float]:
    """Return milliseconds of a draft forward by its tokens, the lowest of five: what a branch adds."""
    core = llm.llm_engine.engine_core.engine_core
    draft_pass = core.model_executor.driver_worker.worker.model_runner.drafter.draft_pass
    found = {}
    for size in FORWARD_SIZES:
        found[str(size)] = round(1e3 * min(draft_pass.time_forward(size, min(size, 8)) for _ in range(5)), 2)
    return found


def _take_turns(
    plain: Any, llm: Any, compared: dict[str, dict[str, Any]], texts: list[str], max_tokens: int
) -> dict[str, Run]:
    from vllm import SamplingParams

    def complete(engine: Any, text: str, options: dict[str, Any] | None, own: Run) -> None:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, extra_args={"nld": options} if options else None)
        started = time.perf_counter()
        own.texts.append(list(engine.generate(text, params, use_tqdm=False)[0].outputs[0].token_ids))
        own.seconds += time.perf_counter() - started

    runs = {name: Run() for name in (AR, *compared)}
    for number, text in enumerate([texts[0], *texts]):
        print(f"bench: prompt {number} of {len(texts)} ...", file=sys.stderr, flush=True)
        if number == 1:  # the turn before warmed up
            runs = {name: Run() for name in runs}
        complete(plain, text, None, runs[AR])
        for name, options in compared.items():
            before = llm.collective_rpc("nld_tally")[0]
            complete(llm, text, options, runs[name])
            runs[name].tally.add(Tally.between(before, llm.collective_rpc("nld_tally")[0]))
    return runs


def _rows(runs: dict[str, Run]) -> list[dict[str, Any]]:
    def speed(own: Run) -> float:
        return sum(map(len, own.texts)) / own.seconds

    rows = []
    for name, own in runs.items():
        generated = sum(map(len, own.texts))
        forwards = sum(count for kind, count in own.tally.forwards.items() if kind != "prefill") or generated
        blocks = max(1, own.tally.blocks["self_speculation"])
        rows.append(
            {
                "way": name,
                "tpf": round(generated / forwards, 3),
                "acceptance_length": round(own.tally.acceptance_length() or 1.0, 3),
                "guess_hits": round(own.tally.branches["guess"] / blocks, 3),
                "mask_hits": round(own.tally.branches["mask"] / blocks, 3),
                "branch_tokens_per_forward": round(own.tally.branches["tokens"] / forwards, 1),
                "tokens_per_s": round(speed(own), 1),
                "speed_up": round(speed(own) / speed(runs[AR]), 3),
                "same_text_as_ar": sum(a == b for a, b in zip(own.texts, runs[AR].texts, strict=True)),
            }
        )
    return rows


def _show(report: dict[str, Any]) -> None:
    console = report_console()
    table = Table(*(name.replace("_", " ") for name in report["ways"][0]))
    for row in report["ways"]:
        table.add_row(*map(str, row.values()))
    console.print(table)
    console.print("forward, ms by tokens: " + ", ".join(f"{size}: {ms}" for size, ms in report["forward"].items()))
    console.print(f"{report['prompts']} held-out prompts of {report['max_tokens']} tokens; TPF without the prefill")
