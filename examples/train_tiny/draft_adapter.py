"""Train the embedded checkpoint's draft adapter, on its own continuations of the training text and of unseen text.

The same trainer as `vllm-nld train-draft-lora`; only the text comes from the standard library instead of a file.

    python examples/train_tiny/draft_adapter.py vllm_nld/checkpoints/tiny --output build/adapter
    python examples/train_tiny/draft_adapter.py vllm_nld/checkpoints/tiny --output build/adapter --resume
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path
from typing import Any

import corpus
import torch
from tokenizers import Tokenizer

from vllm_nld.checkpoints.held_out import HELD_OUT_MODULES
from vllm_nld.cli.train_draft_lora import train
from vllm_nld.training import Settings
from vllm_nld.training.text import Stream, encode
from vllm_nld.training.trainer import Schedule

SETTINGS: dict[str, Any] = {
    "rank": 32,
    "steps": 1000,
    "learning_rate": 2e-3,
    "rows": 2048,
    "held_out_rows": 48,
    "dtype": "bfloat16",
}
"""What the embedded adapter was trained with; the rest are the trainer's defaults."""


def stream(checkpoint: Path) -> Stream:
    """Return the training text, text that the model never saw, and the held-out modules."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    root = Path(sysconfig.get_path("stdlib"))
    held_out = [corpus.read(root / name) for name in HELD_OUT_MODULES if (root / name).is_file()]
    known = encode(corpus.documents(), tokenizer)
    unseen = encode(corpus.unseen_documents(), tokenizer)
    return Stream(torch.cat((known, unseen)), encode(held_out, tokenizer))


def main() -> None:
    """Train, or go on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--minutes", type=float, help="stop after so long; --resume goes on")
    parser.add_argument("--steps", type=int, default=SETTINGS["steps"])
    parser.add_argument("--rank", type=int, default=SETTINGS["rank"])
    parser.add_argument("--learning-rate", type=float, default=SETTINGS["learning_rate"])
    args = parser.parse_args()
    changed = {"steps": args.steps, "rank": args.rank, "learning_rate": args.learning_rate}
    settings = Settings.of(**SETTINGS | changed)
    schedule = Schedule(minutes=args.minutes)
    train(args.checkpoint, stream(args.checkpoint), settings, schedule, args.output, args.resume, "cpu")


if __name__ == "__main__":
    main()
