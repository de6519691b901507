"""Where commands print their tables."""

from __future__ import annotations

import os

from rich.console import Console

WIDE = 160
"""Columns where no terminal sets a limit: rich would take 80, and cut the headings of tables."""


def report_console() -> Console:
    """Return a console on standard output: as wide as the terminal, or as a table needs in a file or a pipe."""
    found = Console()
    return found if found.is_terminal or "COLUMNS" in os.environ else Console(width=WIDE)
