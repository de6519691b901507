"""Checkpoints that ship with the package."""

from __future__ import annotations

from pathlib import Path

from vllm_nld.errors import NLDError

EMBEDDED = {"tiny": Path(__file__).parent / "tiny"}
"""Name -> folder in Hugging Face layout."""


def checkpoint_path(name: str) -> Path:
    """Return the folder of an embedded checkpoint.

    Raises:
        NLDError: there is no such checkpoint, or the installation lacks its weights.
    """
    if name not in EMBEDDED:
        raise NLDError(f"checkpoint {name!r} is not embedded; available: {', '.join(sorted(EMBEDDED))}")
    folder = EMBEDDED[name]
    if not (folder / "model.safetensors").is_file():
        raise NLDError(f"checkpoint {name!r}: {folder} holds no model.safetensors; reinstall vllm-nld")
    return folder
