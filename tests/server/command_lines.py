"""Command lines against a running server, several in one process: its imports take longer than its requests."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

CODE = """
import json, sys
from {module} import {function}
for line in json.loads(sys.argv[1]):
    sys.argv = line
    {function}()
"""


def run_in_one_process(python: str, entry_point: str, lines: list[list[str]], folder: Path) -> str:
    """Run command lines one after another, and return their standard output.

    Args:
        python: interpreter of the environment that has the command.
        entry_point: ``module:function`` of the command.
        lines: what would be typed, the command's name first.
        folder: to start in; what the command caches goes there.
    """
    module, function = entry_point.split(":")
    code = CODE.format(module=module, function=function)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    command = [python, "-c", code, json.dumps(lines)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=folder, env=environment)
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    return result.stdout


def python_with_lm_eval() -> str | None:
    """Return an interpreter that has lm-eval: of ``VLLM_NLD_LM_EVAL``, or this one; None if there is none."""
    named = os.environ.get("VLLM_NLD_LM_EVAL")
    if named:
        return named
    try:  # not by looking for the module: examples/lm_eval has its name
        importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        return None
    return sys.executable
