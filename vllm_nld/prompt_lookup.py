"""Drafts from what was said before: text that repeats itself, or its prompt, continues as it did the last time.

A block is drafted as ever. Behind its first unsure draft, where verify would most likely stop, the drafts are replaced
by what followed the last few tokens at their latest earlier occurrence, if there is one. That takes no forward.
Looking up the whole block instead accepts a little more where drafts are poor, but throws away good ones;
``benchmarks/draft_hints.py`` compares.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_nld.block import Block

UNSURE = 0.5
"""Confidence below which a draft is more often wrong than right."""
LOOKED_UP = 2.0
"""Stands for the confidence of a draft that was looked up; what such drafts are worth, auto mode learns by itself."""

Tokens = np.ndarray[Any, np.dtype[Any]]


def splice(block: Block, history: Tokens, length: int) -> None:
    """Replace the drafts behind a filled block's first unsure one, in place.

    Args:
        block: of self-speculation, seed first.
        history: int ``[tokens]``, prompt and text up to and with the seed.
        length: how many tokens must match.
    """
    unsure = next((place for place in range(1, block.length) if block.confidence[place] < UNSURE), block.length)
    if unsure == block.length:
        return
    tokens = np.concatenate((history, np.asarray(block.tokens[1:unsure], dtype=history.dtype)))
    found = follow(tokens, length)[: block.length - unsure]
    block.tokens[unsure : unsure + len(found)] = found
    block.confidence[unsure : unsure + len(found)] = [LOOKED_UP] * len(found)


def follow(tokens: Tokens, length: int) -> list[int]:
    """Return what followed the last ``length`` tokens at their latest earlier occurrence; nothing if there is none."""
    if len(tokens) <= length:
        return []
    matches = np.ones(len(tokens) - length, dtype=bool)
    for place in range(length):
        matches &= tokens[place : len(tokens) - length + place] == tokens[len(tokens) - length + place]
    starts = np.flatnonzero(matches)
    return [] if len(starts) == 0 else [int(token) for token in tokens[starts[-1] + length :]]
