"""Plots of the command line: files, never windows."""

from __future__ import annotations

from typing import Any

from vllm_nld.errors import NLDError


def file_pyplot() -> Any:
    """Return ``matplotlib.pyplot``, drawing to files.

    Raises:
        NLDError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise NLDError("--plot needs matplotlib: pip install 'vllm-nld[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
