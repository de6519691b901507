"""Bounds of command-line options that typer cannot check: names, devices, files, and what depends on other options."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vllm_nld.errors import NLDError, shown_key

MODEL_LENGTH = 2048
"""Positions of the engines that benchmarks start."""
DTYPES = ("float32", "bfloat16", "float16")


def one_of(option: str, value: str, allowed: Sequence[str]) -> None:
    """Raise NLDError if ``value`` is not among ``allowed``."""
    if value not in allowed:
        raise NLDError(f"{option} {shown_key(value)}: allowed are {', '.join(allowed)}")


def within(option: str, value: float, least: float, most: float, why: str) -> None:
    """Raise NLDError if ``value`` is not a number from ``least`` to ``most``."""
    if not least <= value <= most:
        raise NLDError(f"{option} {shown_key(value)}: allowed are {least} to {most} ({why})")


def check_completions(option: str, tokens: int, texts: Sequence[str]) -> None:
    """Refuse more ``tokens`` than the embedded checkpoint has room for after the longest prompt."""
    from tokenizers import Tokenizer

    from vllm_nld.checkpoints import checkpoint_path

    tokenizer = Tokenizer.from_file(str(checkpoint_path("tiny") / "tokenizer.json"))
    longest = max(len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts)
    why = f"{MODEL_LENGTH} positions, of which the longest prompt takes {longest}"
    within(option, tokens, 1, MODEL_LENGTH - longest, why)


def check_device(name: str) -> None:
    """Refuse a PyTorch device that this machine lacks."""
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise NLDError(f"--device {shown_key(name)}: {reason[:200]}; allowed: cpu, or a device that exists") from None


def check_writable(option: str, path: Path) -> None:
    """Refuse a file whose folder does not exist, before anything is measured for it."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise NLDError(f"{option} {shown_key(str(path))}: allowed: a file in an existing folder")
