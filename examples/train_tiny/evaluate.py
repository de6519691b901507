"""Acceptance length of a checkpoint on held-out text, with the dense reference (1 + accepted / drafts, as in vLLM).

With an adapter, the same prompts run with and without it; the confidence interval of the gain comes from resampling
prompts, because the cycles of one prompt resemble each other.

python examples/train_tiny/evaluate.py build/tiny/checkpoint
python examples/train_tiny/evaluate.py vllm_nld/checkpoints/tiny --adapter vllm_nld/checkpoints/tiny/linear_spec_lora
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from vllm_nld.checkpoints.held_out import held_out_prompts
from vllm_nld.reference import DraftAdapter, ar_generate, linear_spec_generate, load_reference

RESAMPLES = 2000


def summary(cycles: list[list[int]], block_length: int) -> dict[str, Any]:
    """Return acceptance length, number of drafts, and share accepted by position, of each prompt's cycles."""
    emitted = [count for prompt in cycles for count in prompt]
    rates = [sum(count > position for count in emitted) / len(emitted) for position in range(1, block_length)]
    return {
        "acceptance_length": round(sum(emitted) / len(emitted), 4),
        "confidence_95": interval(cycles),
        "drafts": len(emitted),
        "accepted_at_position": [round(rate, 3) for rate in rates],
    }


def resampled(cycles: list[list[int]]) -> np.ndarray:
    """Return acceptance lengths of resampled prompts, with an equal choice of prompts in every call."""
    totals = np.array([(sum(prompt), len(prompt)) for prompt in cycles])
    chosen = np.random.default_rng(0).integers(len(cycles), size=(RESAMPLES, len(cycles)))
    sums = totals[chosen].sum(1)
    return np.asarray(sums[:, 0] / sums[:, 1])


def interval(cycles: list[list[int]], base: list[list[int]] | None = None) -> list[float]:
    """Return the 95% confidence interval of the acceptance length, or of its ratio to that of ``base``."""
    values = resampled(cycles) / (1 if base is None else resampled(base))
    return [round(float(value), 4) for value in np.percentile(values, (2.5, 97.5))]


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--block-length", type=int, default=16)
    parser.add_argument("--adapter", type=Path, help="folder of a draft adapter")
    args = parser.parse_args()
    model = load_reference(args.checkpoint)
    tokenizer = Tokenizer.from_file(str(args.checkpoint / "tokenizer.json"))
    adapters = {"without": None} | ({"with": DraftAdapter.read(args.adapter)} if args.adapter else {})
    cycles: dict[str, list[list[int]]] = {name: [] for name in adapters}  # tokens of each cycle: accepted drafts + 1
    identical = 0
    for _, prompt in tqdm(held_out_prompts(args.prompts), unit="prompt"):
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        expected = ar_generate(model, ids, args.new_tokens).ids if args.adapter else None
        for name, adapter in adapters.items():
            model.draft_adapter = adapter
            found = linear_spec_generate(model, ids, args.new_tokens, block_length=args.block_length)
            cycles[name].append(found.accepted)
            identical += found.ids == expected
    results = {name: summary(found, args.block_length) for name, found in cycles.items()}
    if not args.adapter:
        print(json.dumps(results["without"]))
        return
    gain = results["with"]["acceptance_length"] / results["without"]["acceptance_length"]
    results["gain"] = {"ratio": round(gain, 4), "confidence_95": interval(cycles["with"], cycles["without"])}
    results["texts"] = {"compared": 2 * args.prompts, "identical_to_ar": identical}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
