"""The tests' Ray cluster, and how its workers get vllm-nld."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support import STARTUP

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
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
    """Build and install a wheel into an empty folder, without compiled kernels, which take a minute to build.

    scikit-build-core, which builds it, is among the packages for development, and need not be installed once more.
    """
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    settings = ["--no-deps", "--no-build-isolation", "--config-settings", "wheel.cmake=false"]
    subprocess.run([*pip, *settings, "--target", str(site), str(ROOT)], check=True)
    (site / "sitecustomize.py").write_text((STARTUP / "sitecustomize.py").read_text() + AT_START)
