"""Does a draft get better if some of its positions are given instead of masked? Acceptance length by kind of hint.

    python benchmarks/draft_hints.py [--prompts 40] [--max-tokens 96] [--json]

It runs greedily on the dense reference with the embedded checkpoint and its draft adapter. A cycle is one draft and one
verify forward with every kind of hint, so acceptance lengths compare like speeds. Hints:

- ``tail``: the previous draft's tokens after the new seed that had at least this confidence; ``shift`` moves them, for
  a rejected draft that was right except for a missing or extra token.
- ``lookup``: the tokens that followed the last n tokens at their latest occurrence in prompt and text (prompt lookup).
- ``splice``: a normal draft whose part after the first unsure position is replaced by a lookup, if there is one.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import AutoTokenizer

from vllm_nld.checkpoints import checkpoint_path
from vllm_nld.checkpoints.draft_lora import FOLDER
from vllm_nld.checkpoints.held_out import held_out_prompts
from vllm_nld.draft_sources import prompt_lookup
from vllm_nld.reference import DraftAdapter, KVCache, ReferenceModel, ar_generate, load_reference
from vllm_nld.reference.generate import ids_tensor


@dataclass
class Past:
    """The known tokens at the start of a cycle, which a hint may use.

    Attributes:
        tokens: prompt and text, seed included.
        draft: the last cycle's draft, by position in the text: token and confidence.
    """

    tokens: list[int]
    draft: dict[int, tuple[int, float]] = field(default_factory=dict)


LONGEST = 64
"""Most tokens to look up."""
Hint = Callable[[Past, int], list[int | None]]
"""Returns a token or None for each of the next positions, up to a count."""


def no_hint(past: Past, count: int) -> list[int | None]:
    """Mask every position."""
    return []


def tail(confidence: float, shift: int = 0) -> Hint:
    """Give the last draft's tokens with at least this confidence, moved by ``shift`` positions."""

    def hint(past: Past, count: int) -> list[int | None]:
        found = [past.draft.get(len(past.tokens) + place - shift) for place in range(count)]
        return [None if pair is None or pair[1] < confidence else pair[0] for pair in found]

    return hint


def lookup(length: int, count_limit: int = LONGEST) -> Hint:
    """Give the tokens that followed the last ``length`` tokens earlier."""

    def hint(past: Past, count: int) -> list[int | None]:
        return list(follow(past.tokens, length)[: min(count, count_limit)])

    return hint


def follow(tokens: list[int], length: int) -> list[int]:
    """Return the tokens that followed the last ``length`` tokens earlier, as in an engine's lookup."""
    found = prompt_lookup.Lookup(length, never=frozenset()).find(np.asarray(tokens), LONGEST)
    return [] if found is None else found.tokens


@dataclass
class Way:
    """How a cycle drafts."""

    hint: Hint = no_hint
    splice: tuple[float, int] | None = None


WAYS = {
    "masks only": Way(),
    "tail, 0.5": Way(tail(0.5)),
    "tail, 0.8": Way(tail(0.8)),
    "tail, 0.95": Way(tail(0.95)),
    "tail, 0.8, shift 1": Way(tail(0.8, 1)),
    "tail, 0.8, shift -1": Way(tail(0.8, -1)),
    "lookup 2": Way(lookup(2)),
    "lookup 3": Way(lookup(3)),
    "lookup 5": Way(lookup(5)),
    "lookup 3, 4 tokens": Way(lookup(3, 4)),
    "lookup 5, 8 tokens": Way(lookup(5, 8)),
    "splice 0.3, 3": Way(splice=(0.3, 3)),
    "splice 0.5, 3": Way(splice=(0.5, 3)),
    "splice 0.5, 5": Way(splice=(0.5, 5)),
}


@torch.inference_mode()
def cycles(model: ReferenceModel, prompt: list[int], text: list[int], way: Way) -> list[int]:
    """Return the tokens that each cycle yields over a greedy text, which is equal for every kind of draft."""
    cache, past, yields = KVCache(), Past(prompt + text[:1]), []
    model.causal(ids_tensor(model, prompt), cache)
    full = prompt + text
    while len(past.tokens) < len(full):
        length = min(model.config.block_size, len(full) - len(past.tokens))
        block, confidence = draft(model, cache, past, length, way)
        verified = model.causal(ids_tensor(model, block), cache)[0].argmax(-1).tolist()
        start = len(past.tokens)
        taken = next((i for i in range(length - 1) if verified[i] != block[i + 1]), length - 1) + 1
        assert verified[:taken] == full[start : start + taken], "no draft changes AR's text"
        past.draft = {start + i: (block[i + 1], confidence[i + 1]) for i in range(length - 1)}
        past.tokens += verified[:taken]
        cache.crop(len(past.tokens) - 1)
        yields.append(taken)
    return yields


def draft(model: ReferenceModel, cache: KVCache, past: Past, length: int, way: Way) -> tuple[list[int], list[float]]:
    """Return a drafted block, seed first, and the confidence in each of its tokens."""
    mask = model.config.mask_token_id
    given = [mask if token is None else token for token in way.hint(past, length - 1)]
    block = [past.tokens[-1], *given, *[mask] * (length - 1 - len(given))]
    values, tokens = model.draft(ids_tensor(model, block), cache)[0].softmax(-1).max(-1)
    confidence = [1.0 if token != mask else value for token, value in zip(block, values.tolist(), strict=True)]
    block = [int(tokens[i]) if token == mask else token for i, token in enumerate(block)]
    if way.splice is not None:
        least, size = way.splice
        unsure = next((i for i in range(1, length) if confidence[i] < least), length)
        continued = follow(past.tokens + block[1:unsure], size)[: length - unsure]
        block[unsure : unsure + len(continued)] = continued
    return block, confidence


def compare(prompts: int, max_tokens: int, adapter: bool) -> list[dict[str, object]]:
    """Run every way over the same held-out prompts."""
    folder = checkpoint_path("tiny")
    model, tokenizer = load_reference(folder), AutoTokenizer.from_pretrained(folder)
    model.draft_adapter = DraftAdapter.read(folder / FOLDER) if adapter else None
    texts = []
    for _, text in held_out_prompts(prompts):
        ids = tokenizer(text)["input_ids"]
        texts.append((ids, ar_generate(model, ids, max_tokens).ids[len(ids) :]))
    yields = {}
    for name, way in WAYS.items():
        print(f"draft_hints: {name} ...", file=sys.stderr, flush=True)
        yields[name] = [cycles(model, ids, text, way) for ids, text in texts]
    return [summary(name, own, yields["masks only"]) for name, own in yields.items()]


def summary(name: str, own: list[list[int]], plain: list[list[int]]) -> dict[str, object]:
    """Acceptance length, and its ratio to masks only with a bootstrap interval over prompts."""
    generator = random.Random(0)

    def ratio(prompts: list[int]) -> float:
        # The texts are equal, so the ratio of tokens per cycle is the inverse ratio of the numbers of cycles.
        return sum(len(plain[p]) for p in prompts) / sum(len(own[p]) for p in prompts)

    everything = range(len(own))
    draws = statistics.quantiles([ratio(generator.choices(everything, k=len(own))) for _ in range(1000)], n=40)
    length = sum(map(sum, own)) / sum(map(len, own))
    return {
        "hint": name,
        "acceptance_length": round(length, 3),
        "ratio": round(ratio(list(everything)), 3),
        "interval_95": [round(draws[0], 3), round(draws[-1], 3)],
    }


def main() -> None:
    """Read the options and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--no-adapter", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = compare(options.prompts, options.max_tokens, not options.no_adapter)
    if options.json:
        print(json.dumps(rows))
        return
    for row in rows:
        low, high = row["interval_95"]  # type: ignore[misc]
        print(f"{row['hint']:22} {row['acceptance_length']:6.3f}  {row['ratio']:.3f}  ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
