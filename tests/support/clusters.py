"""The tests' Ray cluster, and how its workers get vllm-nld."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.support import STARTUP

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NO_COMPILER = "/nowhere/no-compiler"
SMALL_REPLICA = ["--cores", "1", "--num-cpus", "0.5", "--num-gpus", "0"]
"""Options of both Ray examples with which two replicas fit two cores."""


@dataclass(frozen=True)
class Cluster:
    """The running cluster.

    Attributes:
        address: for ``RAY_ADDRESS`` or ``ray.init(address=...)``.
        site: the folder that its workers import vllm_nld from.
        pythonpath: its workers' ``PYTHONPATH``: ``site``, and the shim with which Ray accepts CPU workers.
    """

    address: str
    site: Path
    pythonpath: str


AT_START = """

import sys

sys.meta_path[:] = [finder for finder in sys.meta_path if "_editable_" not in type(finder).__module__]
"""
"""Python runs this at its start, because an editable install's finder would come before any folder on the path.

After what every process of the tests runs: of several files of this name on the path, Python takes the first."""


def install(site: Path) -> None:
    """Build a wheel and install it into an empty folder, without compiled kernels, which take a minute to build."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    with tempfile.TemporaryDirectory() as folder:
        build = ["--no-deps", "--wheel-dir", folder, "--config-settings", f"build-dir={folder}/build"]
        subprocess.run([*pip, "wheel", *build, str(ROOT)], check=True, env=os.environ | {"CXX": NO_COMPILER})
        (wheel,) = Path(folder).glob("*.whl")
        subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    (site / "sitecustomize.py").write_text((STARTUP / "sitecustomize.py").read_text() + AT_START)
