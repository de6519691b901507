"""Checkpoints that ship with the package."""

from __future__ import annotations

from pathlib import Path

EMBEDDED = {"tiny": Path(__file__).parent / "tiny"}
"""Name -> folder in Hugging Face layout."""


def checkpoint_path(name: str) -> Path:
    """Return the folder of an embedded checkpoint.

    Raises:
        ValueError: there is no such checkpoint, or the installation lacks its weights.
    """
    if name not in EMBEDDED:
        raise ValueError(f"checkpoint {name!r} is not embedded; available: {', '.join(sorted(EMBEDDED))}")
    folder = EMBEDDED[name]
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"checkpoint {name!r}: {folder} holds no model.safetensors; reinstall vllm-nld")
    return folder
