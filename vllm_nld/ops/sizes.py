"""Sizes that kernels are compiled for."""

from __future__ import annotations


def round_size(tokens: int) -> int:
    """Return the size that a forward of ``tokens`` tokens is padded or trimmed to.

    Libraries compile kernels for every new size (oneDNN takes about 10 ms for one), so few are used.
    """
    step = 4 if tokens <= 16 else 8 if tokens <= 64 else 16
    return -(-tokens // step) * step


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least ``n``: Triton's tiles have such sizes."""
    return 1 << max(0, n - 1).bit_length()
