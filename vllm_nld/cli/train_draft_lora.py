"""``vllm-nld train-draft-lora``: train a draft adapter for a checkpoint on a file of text or conversations."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vllm_nld.checkpoints import named_or_path
from vllm_nld.cli.limits import check_device, within
from vllm_nld.cli.plot import file_pyplot
from vllm_nld.errors import NLDError
from vllm_nld.training import Settings, Trainer
from vllm_nld.training.chats import Chats, chat_template, holds_conversations
from vllm_nld.training.text import Corpus, Stream
from vllm_nld.training.trainer import Schedule, load_frozen


def run(
    model: str,
    data: Path,
    held_out: Path | None,
    output: Path | None,
    start: Path | None,
    resume: bool,
    schedule: Schedule,
    device: str,
    options: dict[str, Any],
) -> None:
    """Check everything, then train.

    Raises:
        NLDError: an option, the checkpoint or a file is not suitable.
    """
    from tokenizers import Tokenizer

    settings = Settings.of(**options)
    check_device(device)
    if schedule.minutes is not None:
        within("--minutes", schedule.minutes, 0, 10**6, "a number")
    folder = named_or_path(model)
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise NLDError(f"MODEL={model}: no {name} there; allowed: a checkpoint folder, tiny or smollm2")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    corpus: Corpus
    if holds_conversations(data):
        corpus = chats = Chats.read(data, held_out, tokenizer, chat_template(folder))
        if left_out := chats.left_out(settings):
            typer.echo(f"{left_out} answers are left out: their prompts are longer than --prefix-tokens", err=True)
    else:
        corpus = Stream.read(data, held_out, tokenizer)
    train(folder, corpus, settings, schedule, output or folder / "linear_spec_lora", resume, device, start)


def train(
    folder: Path,
    corpus: Corpus,
    settings: Settings,
    schedule: Schedule,
    output: Path,
    resume: bool,
    device: str,
    start: Path | None = None,
) -> bool:
    """Train with progress on standard error; write the adapter, and next to it the run with its curve.

    Returns:
        True if training is complete, False if time ran out.

    Raises:
        NLDError: the checkpoint cannot be read, or the output folder is not suitable.
    """
    import torch

    try:
        model = load_frozen(folder, getattr(torch, settings.dtype), device)
    except (OSError, ValueError) as error:
        raise NLDError(f"MODEL={folder}: {' '.join(str(error).split())}") from None
    trainer = Trainer(model, corpus, settings, output, start)
    trainer.begin(resume)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        finished = trainer.run(schedule, progress)
    report(trainer, finished)
    return finished


def report(trainer: Trainer, finished: bool) -> None:
    """Write ``curve.json`` (and ``curve.png``, if matplotlib is installed), and print a summary."""
    content = {
        "settings": trainer.settings.model_dump(),
        "block_length": trainer.block_length,
        "held_out_rows": trainer.settings.held_out_rows,
        "curve": trainer.curve,
    }
    (trainer.state_folder / "curve.json").write_text(json.dumps(content, indent=2) + "\n")
    drawn = importlib.util.find_spec("matplotlib") is not None
    if drawn:
        draw(trainer.curve, trainer.state_folder / "curve.png")
    first, last = trainer.curve[0], trainer.curve[-1]
    typer.echo(
        f"acceptance length on held-out text: {first['acceptance_length']:.2f} before training, "
        f"{last['acceptance_length']:.2f} after {last['step']} steps"
    )
    if not drawn:
        typer.echo("no curve.png: it needs matplotlib (pip install 'vllm-nld[plot]')")
    if finished:
        typer.echo(f"adapter: {trainer.output}")
    else:
        typer.echo(f"time is up after {trainer.step} of {trainer.settings.steps} steps; --resume continues")


def draw(curve: list[dict[str, Any]], path: Path) -> None:
    """Plot the acceptance length against the step, and acceptance by position before and after."""
    pyplot = file_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    left.plot([row["step"] for row in curve], [row["acceptance_length"] for row in curve], marker="o")
    left.set(xlabel="step", ylabel="acceptance length, held-out text")
    for row, label in ((curve[0], "before training"), (curve[-1], f"after {curve[-1]['step']} steps")):
        right.plot(range(1, len(row["by_position"]) + 1), row["by_position"], marker="o", label=label)
    right.set(xlabel="position in the block", ylabel="share of cycles that accept it", ylim=(0, 1))
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
