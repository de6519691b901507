"""Acceptance length of a checkpoint on held-out text, with the dense reference (1 + accepted / drafts, as in vLLM).

python examples/train_tiny/evaluate.py build/tiny/checkpoint
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tokenizers import Tokenizer
from tqdm import tqdm

from vllm_nld.checkpoints.held_out import held_out_prompts
from vllm_nld.reference import linear_spec_generate, load_reference


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--block-length", type=int, default=16)
    args = parser.parse_args()
    model = load_reference(args.checkpoint)
    tokenizer = Tokenizer.from_file(str(args.checkpoint / "tokenizer.json"))
    emitted: list[int] = []  # tokens of each cycle: accepted drafts + 1
    for _, prompt in tqdm(held_out_prompts(args.prompts), unit="prompt"):
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        emitted += linear_spec_generate(model, ids, args.new_tokens, block_length=args.block_length).accepted
    drafts = len(emitted)
    rates = [round(sum(count > position for count in emitted) / drafts, 3) for position in range(1, args.block_length)]
    print(json.dumps({"acceptance_length": sum(emitted) / drafts, "drafts": drafts, "accepted_at_position": rates}))


if __name__ == "__main__":
    main()
