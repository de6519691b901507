"""What branches and quadratic self-speculation gain: tokens and query tokens per forward, on the dense reference.

    python benchmarks/branches.py [--model FOLDER] [--adapter FOLDER] [--prompts 12] [--max-tokens 96] [--json]

Greedy, float32, one request at a time, held-out prompts of the embedded checkpoint (or ``--texts FILE``, one a line).
Checks that each text equals AR's. Counts the forwards after the prompt. In the "one forward" rows, as in the engine, no
draft forward follows a miss: the next forward decides one token, with a mask branch after it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from vllm_nld.branches.places import Choice, every_place, likeliest_places, no_branches
from vllm_nld.checkpoints import checkpoint_path
from vllm_nld.checkpoints.draft_lora import FOLDER
from vllm_nld.checkpoints.held_out import held_out_prompts
from vllm_nld.reference import DraftAdapter, ReferenceModel, ar_generate, branch_spec_generate, load_reference


def policies(block: int) -> dict[str, Choice]:
    """Return what is compared, by name."""
    chosen = {f"{count} branches of {block}": likeliest_places(count, block) for count in (1, 2, 4, 8)}
    if block > 8:
        chosen |= {f"{count} branches of 8": likeliest_places(count, 8) for count in (2, 4, 8)}
    return {"linear": no_branches} | chosen | {"quadratic": every_place(block)}


def measure(model: ReferenceModel, prompts: list[list[int]], block: int, max_tokens: int) -> list[dict[str, object]]:
    """Return a row per policy."""
    expected = [ar_generate(model, prompt, max_tokens).ids for prompt in prompts]
    rows = []
    ways = [(name, choose, True) for name, choose in policies(block).items()]
    ways += [(f"{name}, one forward", choose, False) for name, choose, _ in ways if name != "linear"]
    for name, choose, misses_draft in ways:
        print(f"bench: block {block}, {name} ...", file=sys.stderr, flush=True)
        how = {"look_past": not name.startswith(("linear", "quadratic")), "misses_draft": misses_draft}
        runs = [branch_spec_generate(model, p, choose, max_tokens, block, **how) for p in prompts]
        forwards = sum(run.nfe - 1 for run in runs)
        hits = [hit for run in runs for hit in run.hits]
        made = sum(len(run.ids) - len(p) - 1 for run, p in zip(runs, prompts, strict=True))
        rows.append(
            {
                "block_length": block,
                "policy": name,
                "tpf": round(made / forwards, 3),
                "query_tokens_per_forward": round(sum(sum(run.query_tokens) for run in runs) / forwards, 1),
                "acceptance_length": round(made / len(hits), 3),
                "guess_hits": round(hits.count("guess") / len(hits), 3),
                "mask_hits": round(hits.count("mask") / len(hits), 3),
                "same_text_as_ar": sum(run.ids == ids for run, ids in zip(runs, expected, strict=True)),
                "prompts": len(prompts),
            }
        )
    return rows


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=checkpoint_path("tiny"))
    parser.add_argument("--adapter", type=Path, help="default: the model's own")
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load_reference(options.model)
    model.draft_adapter = DraftAdapter.read(options.adapter or options.model / FOLDER)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if options.texts:
        texts = options.texts.read_text().splitlines()[: options.prompts]
    else:
        texts = [text for _, text in held_out_prompts(options.prompts)]
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    rows = [row for block in options.blocks for row in measure(model, prompts, block, options.max_tokens)]
    if options.json:
        print(json.dumps(rows))
        return
    table = Table(*(name.replace("_", " ") for name in rows[0]))
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
