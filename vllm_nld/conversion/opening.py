"""Which kind of source a path is."""

from __future__ import annotations

from pathlib import Path

from vllm_nld.conversion.gguf_source import GGUFSource
from vllm_nld.conversion.huggingface import HuggingFaceSource
from vllm_nld.conversion.source import NEEDED, Source
from vllm_nld.errors import NLDError


def open_source(path: Path) -> Source:
    """Return the model in a folder or file.

    Raises:
        NLDError: there is none, or NLD cannot have its network; the message says why.
    """
    if path.is_dir():
        return HuggingFaceSource(path)
    if path.suffix == ".gguf" and path.is_file():
        return GGUFSource(path)
    found = "a file of another kind" if path.exists() else "no such file or folder"
    raise NLDError(f"SOURCE={path}: {found}; allowed: {NEEDED}")
