"""The command line in the test process."""

from __future__ import annotations

from functools import cache
from unittest.mock import patch

from typer.main import get_command
from typer.testing import CliRunner, Result

from vllm_nld.cli import app

_get_command = cache(get_command)


def invoke(*arguments: str, env: dict[str, str] | None = None) -> Result:
    """Run ``vllm-nld``. Its commands are made from their signatures once, which takes longer than a refusal."""
    with patch("typer.testing._get_command", _get_command):
        return CliRunner().invoke(app, arguments, env=env)
