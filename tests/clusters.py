"""What the tests know of their Ray cluster, and how its workers get vllm-nld."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import vllm_nld


@dataclass(frozen=True)
class Cluster:
    """The running cluster.

    Attributes:
        address: for ``RAY_ADDRESS`` or ``ray.init(address=...)``.
        site: the folder that its workers import vllm_nld from.
        pythonpath: what its workers have as ``PYTHONPATH``: ``site``, and the shim that lets Ray place CPU workers.
    """

    address: str
    site: Path
    pythonpath: str


NO_EDITABLE_INSTALL = """
import sys

sys.meta_path[:] = [finder for finder in sys.meta_path if "_editable_" not in type(finder).__module__]
"""
"""Run by Python at its start: an editable install's finder would come before any folder on the path."""


def install(site: Path) -> None:
    """Lay the package and its metadata out as a wheel is installed; entry points are found by the latter alone."""
    leave_out = shutil.ignore_patterns("__pycache__")
    for folder in vllm_nld.__path__:  # an editable install keeps the compiled library apart
        shutil.copytree(folder, site / "vllm_nld", ignore=leave_out, dirs_exist_ok=True)
    (site / "sitecustomize.py").write_text(NO_EDITABLE_INSTALL)
    metadata = Path(str(distribution("vllm-nld")._path))  # type: ignore[attr-defined]
    shutil.copytree(metadata, site / metadata.name)
