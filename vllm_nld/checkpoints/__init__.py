"""Checkpoints by name: those that ship with the package, and those that ``vllm-nld get`` fetches."""

from __future__ import annotations

import os
from pathlib import Path

from vllm_nld.errors import NLDError

EMBEDDED = {name: Path(__file__).parent / name for name in ("tiny", "tiny_vlm")}
"""Name -> folder in Hugging Face layout."""
FETCHED = ("smollm2",)
"""Names that ``vllm-nld get`` knows (:mod:`vllm_nld.conversion.pinned`)."""


def cache_folder() -> Path:
    """Return where fetched checkpoints are: ``$VLLM_NLD_CACHE``, or ``vllm-nld`` in the user's cache."""
    own = os.environ.get("VLLM_NLD_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-nld"


def named_or_path(model: str) -> Path:
    """Return the folder that a command's MODEL means: a known name's, or the path itself.

    Raises:
        NLDError: a known name's checkpoint is not there.
    """
    return checkpoint_path(model) if model in (*EMBEDDED, *FETCHED) else Path(model)


def checkpoint_path(name: str) -> Path:
    """Return the folder of an embedded or fetched checkpoint.

    Raises:
        NLDError: there is no such checkpoint, it was not fetched yet, or the installation lacks its weights.
    """
    if name in FETCHED:
        if not (cache_folder() / name).is_dir():
            raise NLDError(f"checkpoint {name!r} is not in {cache_folder()} yet; fetch it: vllm-nld get {name}")
        return cache_folder() / name
    if name not in EMBEDDED:
        raise NLDError(f"checkpoint {name!r} is not embedded; available: {', '.join(sorted((*EMBEDDED, *FETCHED)))}")
    folder = EMBEDDED[name]
    if not (folder / "model.safetensors").is_file():
        raise NLDError(f"checkpoint {name!r}: {folder} holds no model.safetensors; reinstall vllm-nld")
    return folder
