"""``vllm-nld quantize``: a quantized copy of a checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import typer

from vllm_nld.checkpoints import named_or_path
from vllm_nld.checkpoints.quantize import SCHEMES, Result, quantize


def run(source: str, folder: Path, scheme: str, python: Path, device: str, as_json: bool) -> None:
    """Quantize, and say what came of it.

    Raises:
        NLDError: an argument does not suit, or llm-compressor failed.
    """
    result = quantize(named_or_path(source), folder, scheme, python, device)
    typer.echo(json.dumps(asdict(result)) if as_json else "\n".join(lines(folder, result)))


def lines(folder: Path, result: Result) -> list[str]:
    """Return what a reader wants to know of a quantization."""
    carried = f"; copied as they are: {', '.join(result.carried)}" if result.carried else ""
    return [
        f"{folder}: {SCHEMES[result.scheme]}; {result.bytes_before / 1e6:.0f} MB became {result.bytes_after / 1e6:.0f}",
        f"{result.matrices} matrices quantized; the least exact, {result.worst}, is off by {result.error:.1%} (RMS)",
        f"head and embedding are unchanged{carried}",
    ]
