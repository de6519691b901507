"""Chat requests in AR, self-speculation and auto mode, and with vLLM's own ``ngram`` speculation, in one run.

    vllm-nld get smollm2
    python benchmarks/chats.py prompts.jsonl --model smollm2 [--prompts 16] [--concurrency 1 4 16] [--json FILE]

Every line of the file is an object with ``prompt``, a user's message; the model's chat template is applied. A new
request begins when one ends, so that as many as asked for are in flight. TPF counts every decode forward of a request
(AR, draft, verify), as ``vllm-nld bench modes`` does. AR and ``ngram`` have engines of their own, without this
extension's speculation. "Equal" texts are those of AR with the first concurrency; in bfloat16 near-ties differ.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_nld.checkpoints import named_or_path
from vllm_nld.cli.engine import PROPOSER, engine_with, prepare_environment, stdout_to_stderr
from vllm_nld.cli.sol import read_prompts
from vllm_nld.serving.ledger import Tally

POSITIONS = 2048
NGRAM = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4, "prompt_lookup_min": 2}


@dataclass(frozen=True)
class Way:
    """A row of the table.

    Attributes:
        speculation: the engine's ``speculative_config``; ways with equal ones share an engine.
        nld: a request's options, for engines of this extension's.
    """

    speculation: dict[str, Any] | None
    nld: dict[str, Any] | None = None


WAYS = {
    "AR": Way(None),
    "self-speculation": Way({"model": PROPOSER}, {"mode": "self_speculation", "prompt_lookup": 0}),
    "self-speculation, lookup": Way({"model": PROPOSER}, {"mode": "self_speculation"}),
    "auto": Way({"model": PROPOSER}, {"mode": "auto"}),
    "ngram": Way(NGRAM),
}
"""``ngram`` is last: it imports numba, after which vLLM 0.32 starts no other engine in the process."""


@dataclass
class Cost:
    """What some requests took: forwards count once for every request in them, without the prefill's."""

    seconds: float
    tokens: int
    forwards: int
    acceptance_length: float | None


def main() -> None:
    """Measure every way at every concurrency, print a table, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", default="smollm2", help="name or folder")
    parser.add_argument("--prompts", type=int, default=16, help="spread evenly over the file")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--draft-lora", help="another adapter than the checkpoint's, or off")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    texts = read_prompts(args.file)
    count = min(args.prompts, len(texts))
    texts = [texts[index * len(texts) // count] for index in range(count)]
    prepare_environment()
    with stdout_to_stderr():
        rows = list(measure(args, texts))
    report = {"model": args.model, "dtype": args.dtype, "prompts": count, "max_tokens": args.max_tokens, "rows": rows}
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    show(report)


def measure(args: argparse.Namespace, texts: list[str]) -> Iterator[dict[str, Any]]:
    """Yield a row per way and concurrency; ``same_text`` compares with the first way at the first concurrency."""
    expected: list[list[int]] = []
    left = list(args.ways)
    while left:
        speculation = WAYS[left[0]].speculation
        together = [name for name in left if WAYS[name].speculation == speculation]
        left = [name for name in left if name not in together]
        settings: dict[str, Any] = {"speculative_config": speculation}
        if speculation and args.draft_lora and "model" in speculation:
            settings["additional_config"] = {"nld": {"draft_lora": args.draft_lora}}
        most = max(args.concurrency)
        with engine_with(
            model=str(named_or_path(args.model)), dtype=args.dtype, max_num_seqs=most, max_model_len=POSITIONS,
            kv_cache_memory_bytes=1 << 29, enable_prefix_caching=False, **settings,
        ) as llm:  # fmt: skip
            prompts = encoded(llm, texts)
            for name in together:
                complete(llm, prompts[:most], WAYS[name].nld, most, 16)  # warm up
                for clients in args.concurrency:
                    cost, tokens = watched(llm, prompts, WAYS[name].nld, clients, args.max_tokens)
                    expected = expected or tokens
                    row = {
                        "way": name,
                        "concurrency": clients,
                        "tpf": round(cost.tokens / cost.forwards, 3),
                        "tokens_per_s": round(cost.tokens / cost.seconds, 1),
                        "acceptance_length": cost.acceptance_length and round(cost.acceptance_length, 3),
                        "tokens": cost.tokens,
                        "same_text": sum(a == b for a, b in zip(tokens, expected, strict=True)),
                    }
                    print(json.dumps(row), file=sys.stderr, flush=True)
                    yield row


def encoded(llm: Any, texts: list[str]) -> list[list[int]]:
    """Return the tokens of a chat with each message."""
    tokenizer = llm.get_tokenizer()
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in texts
    ]
    return [tokenizer.encode(chat, add_special_tokens=False) for chat in chats]


def watched(
    llm: Any, prompts: list[list[int]], nld: dict[str, Any] | None, clients: int, max_tokens: int
) -> tuple[Cost, list[list[int]]]:
    """Complete the prompts; return what it took, and the tokens."""
    before, tally = speculated(llm), llm.collective_rpc("nld_tally")[0] if nld else None
    started = time.perf_counter()
    tokens = complete(llm, prompts, nld, clients, max_tokens)
    seconds, total = time.perf_counter() - started, sum(map(len, tokens))
    drafts, accepted = (now - then for now, then in zip(speculated(llm), before, strict=True))
    # A request's steps without an accepted draft yield a token each, of which the prefill yields the first.
    forwards = total - accepted - len(prompts)
    if tally is not None:
        spent = Tally.between(tally, llm.collective_rpc("nld_tally")[0]).forwards
        forwards = sum(number for kind, number in spent.items() if kind != "prefill")
    return Cost(seconds, total, forwards, 1 + accepted / drafts if drafts else None), tokens


def speculated(llm: Any) -> tuple[int, int]:
    """Return vLLM's counts of drafted blocks and of accepted drafts."""
    found = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    names = ("vllm:spec_decode_num_drafts", "vllm:spec_decode_num_accepted_tokens")
    return int(found.get(names[0], 0)), int(found.get(names[1], 0))


def complete(
    llm: Any, prompts: Sequence[list[int]], nld: dict[str, Any] | None, clients: int, max_tokens: int
) -> list[list[int]]:
    """Return the greedy tokens after each prompt, with ``clients`` requests in flight."""
    from vllm import SamplingParams

    options = {"extra_args": {"nld": nld}} if nld else {}
    params = SamplingParams(temperature=0, max_tokens=max_tokens, detokenize=False, **options)
    core, found, running, number = llm.llm_engine, [[] for _ in prompts], 0, 0
    names: dict[str, int] = {}
    while number < len(prompts) or running:
        while running < clients and number < len(prompts):
            name = f"{os.urandom(8).hex()}-{number}"
            core.add_request(name, {"prompt_token_ids": prompts[number]}, params)
            names[name], number, running = number, number + 1, running + 1
        for output in core.step():
            found[names[output.request_id]] = list(output.outputs[0].token_ids)
            running -= output.finished
    return found


def show(report: dict[str, Any]) -> None:
    """Print the table."""
    table = Table("requests at once", "way", "TPF", "acceptance length", "tokens/s", "texts equal to AR's")
    for row in sorted(report["rows"], key=lambda row: row["concurrency"]):
        length = row["acceptance_length"]
        table.add_row(
            str(row["concurrency"]), row["way"], f"{row['tpf']:.2f}", f"{length:.2f}" if length else "-",
            f"{row['tokens_per_s']:.1f}", f"{row['same_text']} of {report['prompts']}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(f"{report['model']}, {report['dtype']}, greedy, {report['max_tokens']} tokens at most")


if __name__ == "__main__":
    main()
