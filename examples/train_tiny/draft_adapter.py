"""Train the embedded checkpoint's draft adapter, on its own continuations of the training text and of unseen text.

It uses the trainer of `vllm-nld train-draft-lora`, but the text comes from the standard library instead of a file. The
same command continues an interrupted run.

    python examples/train_tiny/draft_adapter.py vllm_nld/checkpoints/tiny --output build/adapter
"""

from __future__ import annotations

import argparse
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import corpus
import torch
from tokenizers import Tokenizer

from vllm_nld.checkpoints.draft_lora import CONFIG_FILE, FOLDER, WEIGHTS_FILE
from vllm_nld.checkpoints.held_out import HELD_OUT_MODULES
from vllm_nld.cli.train_draft_lora import train
from vllm_nld.training import Settings
from vllm_nld.training.text import Stream, encode
from vllm_nld.training.trainer import Schedule

SETTINGS: dict[str, Any] = {
    "rank": 64,
    "steps": 800,
    "learning_rate": 5e-4,
    "warm_up": 10,
    "rows": 12288,
    "prefix_tokens": 112,
    "new_tokens": 80,
    "held_out_rows": 96,
    "dtype": "bfloat16",
}
"""Settings of the embedded adapter's training; the others are the trainer's defaults."""


def stream(checkpoint: Path) -> Stream:
    """Return the training text, text that the model was not trained on, and the held-out modules."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    root = Path(sysconfig.get_path("stdlib"))
    held_out = [corpus.read(root / name) for name in HELD_OUT_MODULES if (root / name).is_file()]
    known = encode(corpus.documents(), tokenizer)
    unseen = encode(corpus.unseen_documents(), tokenizer)
    return Stream(torch.cat((known, unseen)), encode(held_out, tokenizer))


def train_adapter(
    checkpoint: Path, output: Path, device: str = "cpu", minutes: float | None = None, **changed: Any
) -> None:
    """Train, or continue the run in ``output``; a finished adapter is copied into the checkpoint's folder."""
    settings = Settings.of(**SETTINGS | {name: value for name, value in changed.items() if value is not None})
    resume = (output / "training" / "state.pt").is_file()
    if train(checkpoint, stream(checkpoint), settings, Schedule(minutes=minutes), output, resume, device):
        (checkpoint / FOLDER).mkdir(exist_ok=True)
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            shutil.copy(output / file, checkpoint / FOLDER / file)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="folder for the run; continues one that is there")
    parser.add_argument("--minutes", type=float, help="stop after this time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name in ("steps", "rank", "learning_rate", "rows", "dtype"):
        value = SETTINGS[name]
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), help=f"default: {value}")
    args = vars(parser.parse_args())
    train_adapter(args.pop("checkpoint"), args.pop("output"), args.pop("device"), args.pop("minutes"), **args)


if __name__ == "__main__":
    main()
