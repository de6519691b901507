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


def install(site: Path) -> None:
    """Lay the package and its metadata out as a wheel is installed; entry points are found by the latter alone."""
    shutil.copytree(Path(vllm_nld.__file__).parent, site / "vllm_nld", ignore=shutil.ignore_patterns("__pycache__"))
    metadata = Path(str(distribution("vllm-nld")._path))  # type: ignore[attr-defined]
    shutil.copytree(metadata, site / metadata.name)
