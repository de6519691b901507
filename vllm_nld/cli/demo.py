"""``vllm-nld demo``: the same text in AR and in self-speculation, with the cost of each.

``tiny`` completes code that it was not trained on; an instruct model answers fixed questions.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from vllm_nld.checkpoints import checkpoint_path
from vllm_nld.checkpoints.held_out import held_out_prompts
from vllm_nld.cli.console import report_console
from vllm_nld.cli.engine import engine, prepare_environment, stdout_to_stderr
from vllm_nld.cli.limits import DTYPES, MODEL_LENGTH, check_completions, one_of, within

TPF_CONVENTION = "tokens per forward, every forward counted: prefill, draft and verify"
MODELS = ("tiny", "smollm2")
QUESTIONS = (
    ("chat", "How do plants make their own food?"),
    ("code", "Write a Python function that counts how often each word appears in a text, and explain it."),
    ("math", "A train travels 60 miles in the first hour and 45 in each of the next two. How far does it go in all?"),
    ("chat", "What are the benefits of learning a second language?"),
)
"""What instruct models are asked, by category. The draft adapter of ``smollm2`` was not trained on these."""
QUESTION_TOKENS = 128
"""More than any of them takes, with the chat template."""


@dataclass(frozen=True)
class Prompt:
    """A text to complete, or a question to answer.

    Attributes:
        source: the module that the text is from, or the question's category.
        text: without the model's chat template.
        question: whether the template is applied.
    """

    source: str
    text: str
    question: bool


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


def run(model: str, count: int, max_tokens: int, dtype: str, as_json: bool) -> None:
    """Run both modes and print the comparison.

    Args:
        model: one of :data:`MODELS`.
        count: of prompts.
        max_tokens: of each, at most.
        dtype: of the weights.
        as_json: print one JSON object instead.

    Raises:
        NLDError: an option is out of range, or the model was not fetched.
    """
    one_of("--model", model, MODELS)
    one_of("--dtype", dtype, DTYPES)
    prompts, folder = _prompts(model, count, max_tokens), checkpoint_path(model)
    prepare_environment()
    with stdout_to_stderr():
        which = "the embedded checkpoint" if model == "tiny" else model
        _say(f"AR: loading {which} in vLLM (about 20 s, mostly imports) ...")
        ar = _complete(folder, prompts, max_tokens, dtype, self_speculation=False)
        _say("self-speculation: the same checkpoint, drafting for itself ...")
        spec = _complete(folder, prompts, max_tokens, dtype, self_speculation=True)
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


def _prompts(model: str, count: int, max_tokens: int) -> list[Prompt]:
    """Return the prompts, which leave room for as many tokens."""
    if model == "tiny":
        prompts = [Prompt(module, text, question=False) for module, text in held_out_prompts(count)]
        check_completions("--max-tokens", max_tokens, [prompt.text for prompt in prompts])
        return prompts
    within("--prompts", count, 1, len(QUESTIONS), f"questions for {model}")
    room = f"{MODEL_LENGTH} positions, of which a question takes up to {QUESTION_TOKENS}"
    within("--max-tokens", max_tokens, 1, MODEL_LENGTH - QUESTION_TOKENS, room)
    return [Prompt(category, text, question=True) for category, text in QUESTIONS[:count]]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _complete(folder: Path, prompts: list[Prompt], max_tokens: int, dtype: str, self_speculation: bool) -> ModeResult:
    drafts = 0 if self_speculation else None
    with engine(str(folder), drafts=drafts, dtype=dtype, max_model_len=MODEL_LENGTH) as llm:
        from vllm import SamplingParams

        def complete(prompt: Prompt, tokens: int) -> Any:
            params = SamplingParams(temperature=0, max_tokens=tokens)
            if prompt.question:
                return llm.chat([{"role": "user", "content": prompt.text}], params, use_tqdm=False)[0].outputs[0]
            return llm.generate(prompt.text, params, use_tqdm=False)[0].outputs[0]

        complete(prompts[0], 16)  # warm up
        before = _counters(llm, self_speculation)
        started = time.perf_counter()
        outputs = [complete(prompt, max_tokens) for prompt in prompts]
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


def _show(report: dict[str, Any], prompts: list[Prompt], texts: list[str]) -> None:
    console = report_console()
    for prompt, text in zip(prompts, texts, strict=True):
        if prompt.question:
            console.rule(prompt.source, align="left")
            console.print(prompt.text, style="dim", markup=False, highlight=False)
        else:
            console.rule(f"{prompt.source} (held out)", align="left")
            tail = "\n".join(prompt.text.splitlines()[-3:])
            console.print(tail, style="dim", markup=False, highlight=False, end="")
        console.print(text, style="bold", markup=False, highlight=False)
    console.rule()
    question = "question; bold: the model's answer"
    console.print(
        f"dim: {question if prompts[0].question else 'end of the prompt; bold: completed by the model'}", style="dim"
    )
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
