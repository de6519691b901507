"""``vllm-nld convert``: an NLD checkpoint of a model of the Llama family."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from vllm_nld.conversion import Options, convert, open_source
from vllm_nld.conversion.checkpoint import Progress, Result, check_target


def run(source: Path, folder: Path, options: Options, as_json: bool) -> None:
    """Convert with progress on standard error, and say what came of it.

    Raises:
        NLDError: an option or the source does not suit.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # the bars here are enough
    check_target(folder, options)
    with bars() as progress:
        result = convert(open_source(source), folder, options, progress)
    typer.echo(json.dumps(asdict(result)) if as_json else "\n".join(lines(folder, result)))


@contextmanager
def bars() -> Iterator[Progress]:
    """Yield what shows progress, one bar for each thing that is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, console=Console(stderr=True)) as shown:
        tasks: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = shown.add_task(what, total=total)
            shown.update(tasks[what], completed=done)

        yield progress


def lines(folder: Path, result: Result) -> list[str]:
    """Return what a reader wants to know of a conversion."""
    tied = ", embeddings tied" if result.tied else ""
    found = [
        f"{folder}: {result.parameters / 1e6:.1f} M parameters, {result.bytes / 1e6:.0f} MB in {result.dtype}{tied}",
        f"block length {result.block_length}, mask token {result.mask_token_id} "
        f"({result.mask_token or 'a row that no text leads to'})",
    ]
    agreement = result.agreement
    if agreement is None:
        return [*found, "not compared with the source (--no-check)"]
    found.append(
        f"logits equal the source's within {agreement.difference:.2g} at {agreement.positions} positions (float32, "
        f"largest logit {agreement.largest:.3g})"
    )
    if agreement.rounding:
        found.append(
            f"rounding to {result.dtype} changes logits by up to {agreement.rounding:.2g}, and the most probable token "
            f"at {agreement.positions - agreement.same_best} of {agreement.positions} positions"
        )
    return found
