"""``vllm-nld demo``: the same text in AR and in self-speculation, with the cost of each."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_nld.checkpoints.held_out import held_out_prompts
from vllm_nld.cli.engine import engine, prepare_environment, stdout_to_stderr
from vllm_nld.cli.limits import DTYPES, check_completions, one_of

TPF_CONVENTION = "tokens per forward, every forward counted: prefill, draft and verify"


@dataclass
class ModeResult:
    """One mode over all prompts, one request at a time."""

    token_ids: list[list[int]]
    texts: list[str]
    seconds: float
    forwards: int
    acceptance_length: float | None

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids in self.token_ids)

    def summary(self) -> dict[str, float]:
        """Figures of the mode, as ``--json`` prints them."""
        figures = {
            "tpf": round(self.tokens / self.forwards, 3),
            "tokens_per_s": round(self.tokens / self.seconds, 2),
            "tokens": self.tokens,
            "forwards": self.forwards,
        }
        if self.acceptance_length is not None:
            figures["acceptance_length"] = round(self.acceptance_length, 3)
        return figures


def run(folder: Path, count: int, max_tokens: int, dtype: str, as_json: bool) -> None:
    """Run both modes and print the comparison.

    Raises:
        NLDError: an option is out of range.
    """
    one_of("--dtype", dtype, DTYPES)
    prompts = held_out_prompts(count)
    texts = [text for _, text in prompts]
    check_completions("--max-tokens", max_tokens, texts)
    prepare_environment()
    with stdout_to_stderr():
        _say("AR: loading the embedded checkpoint in vLLM (about 20 s, mostly imports) ...")
        ar = _complete(folder, texts, max_tokens, dtype, self_speculation=False)
        _say("self-speculation: the same checkpoint, drafting for itself ...")
        spec = _complete(folder, texts, max_tokens, dtype, self_speculation=True)
    report = {
        "identical": ar.token_ids == spec.token_ids,
        "dtype": dtype,
        "tpf_convention": TPF_CONVENTION,
        "modes": {"ar": ar.summary(), "self_speculation": spec.summary()},
        "speedup": round(ar.seconds / ar.tokens * spec.tokens / spec.seconds, 3),
    }
    if as_json:
        print(json.dumps(report))
    else:
        _show(report, prompts, ar.texts)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _complete(folder: Path, texts: list[str], max_tokens: int, dtype: str, self_speculation: bool) -> ModeResult:
    with engine(str(folder), drafts=0 if self_speculation else None, dtype=dtype) as llm:
        from vllm import SamplingParams

        greedy = SamplingParams(temperature=0, max_tokens=max_tokens)
        llm.generate(texts[0], SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)  # warm up
        before = _counters(llm, self_speculation)
        started = time.perf_counter()
        outputs = [llm.generate(text, greedy, use_tqdm=False)[0].outputs[0] for text in texts]
        seconds = time.perf_counter() - started
        after = _counters(llm, self_speculation)
    token_ids = [list(output.token_ids) for output in outputs]
    spent = {key: after[key] - before[key] for key in after}
    acceptance = 1 + spent["accepted"] / spent["drafts"] if self_speculation else None
    return ModeResult(token_ids, [output.text for output in outputs], seconds, spent["forwards"], acceptance)


def _counters(llm: Any, self_speculation: bool) -> dict[str, int]:
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    # vLLM observes this histogram once an engine step, and a step is one causal forward.
    forwards = metrics["vllm:iteration_tokens_total"].count
    if not self_speculation:
        return {"forwards": forwards}
    return {
        "forwards": forwards + llm.collective_rpc("nld_counters")[0]["draft_forwards"],
        "drafts": metrics["vllm:spec_decode_num_drafts"].value,
        "accepted": metrics["vllm:spec_decode_num_accepted_tokens"].value,
    }


def _show(report: dict[str, Any], prompts: list[tuple[str, str]], texts: list[str]) -> None:
    console = Console()
    for (module, prompt), text in zip(prompts, texts, strict=True):
        console.rule(f"{module} (held out)", align="left")
        tail = "\n".join(prompt.splitlines()[-3:])
        console.print(tail, style="dim", markup=False, highlight=False, end="")
        console.print(text, style="bold", markup=False, highlight=False)
    console.rule()
    console.print("dim: end of the prompt; bold: completed by the model", style="dim")
    verdict = "token for token identical" if report["identical"] else "NOT identical"
    console.print(f"AR and self-speculation ({report['dtype']}, greedy): {verdict}")
    table = Table("mode", "tokens per forward", "acceptance length", "tokens/s", "speed-up")
    modes = report["modes"]
    table.add_row("AR", f"{modes['ar']['tpf']:.2f}", "-", f"{modes['ar']['tokens_per_s']:.1f}", "1.00")
    spec = modes["self_speculation"]
    table.add_row(
        "self-speculation",
        f"{spec['tpf']:.2f}",
        f"{spec['acceptance_length']:.2f}",
        f"{spec['tokens_per_s']:.1f}",
        f"{report['speedup']:.2f}",
    )
    console.print(table)
    console.print(
        f"{report['tpf_convention']}; acceptance length as vLLM defines it: 1 + accepted / drafts", style="dim"
    )
