"""Drafts from what was said before: text that repeats itself, or its prompt, continues as it did the last time.

They take no forward. Behind a drafted block's first unsure draft, where verify would most likely stop, they replace
what was drafted. Where lengths are chosen (auto mode), they can also stand alone, without any draft forward.
``benchmarks/draft_hints.py`` compares ways of combining.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_nld.draft_pass.block import Block

UNSURE = 0.5
"""Confidence below which a draft is more often wrong than right."""
LONGEST_MATCH = 16
"""Matches are not followed back any further."""
MATCH_CLASSES = (4, 6, 9, LONGEST_MATCH)
"""Shortest matches of the classes above the lowest: the longer the match, the more it promises."""
LOOKED_UP = 2.0
"""Stands, with the class of the match added, for the confidence of a looked-up draft; what those are worth is learned
(:class:`vllm_nld.auto.acceptance.Calibration`)."""

Tokens = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Found:
    """What an earlier place suggests.

    Attributes:
        tokens: what followed there.
        match: how many tokens before agree with the end of the text, at most ``LONGEST_MATCH``.
    """

    tokens: list[int]
    match: int

    def confidence(self) -> list[float]:
        """Return what stands for the drafts' confidence: the first draft of a run is less certain than its others."""
        level = LOOKED_UP + 2 * bisect_right(MATCH_CLASSES, self.match)
        return [level] + [level + 1] * (len(self.tokens) - 1)

    def block(self, seed: int, prefix: int) -> Block:
        """Return a full block of self-speculation, which takes no forward; ``prefix`` tokens come before the seed."""
        return Block(prefix, [seed, *self.tokens], confidence=[1.0, *self.confidence()])

    def first(self, count: int) -> Found:
        """Return the same with no more than ``count`` tokens."""
        return Found(self.tokens[:count], self.match)


class Lookup:
    """A text's runs of ``length`` tokens, and where each of them ended last; grows with the text.

    Args:
        length: how many tokens must match.
        mask_token_id: never suggested, though a prompt may hold it.
    """

    def __init__(self, length: int, mask_token_id: int) -> None:
        self.length, self._mask_token_id = length, mask_token_id
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}

    def find(self, text: Tokens, most: int, drafts: Sequence[int] = ()) -> Found | None:
        """Return what followed the last ``length`` tokens at their latest earlier occurrence; None if there is none.

        A match that ends close before the end is a loop, and goes on as one.

        Args:
            text: int ``[tokens]``, prompt and text so far; what it was the last time, and perhaps more.
            most: tokens to return at most.
            drafts: tokens that are to follow the text, and are part of what must match.
        """
        self._extend(text)
        known, length = len(self._tokens), self.length
        tokens = [*self._tokens, *drafts] if drafts else self._tokens
        if len(tokens) <= length or most < 1:
            return None
        tail = tokens[-length:]
        ends = range(len(tokens) - 1, max(known, length) - 1, -1)  # among the drafts, which are in no table
        end = next((end for end in ends if tokens[end - length : end] == tail), None) if drafts else None
        end = self._ends.get(tuple(tail)) if end is None else end
        if end is None:
            return None
        found = tokens[end : end + most]
        period = len(found)
        while len(found) < most:
            found.append(found[-period])
        if self._mask_token_id in found:
            found = found[: found.index(self._mask_token_id)]
        return Found(found, _match(tokens, end, length)) if found else None

    def may_find(self, text: Tokens) -> bool:
        """Whether the end of the text, as for :meth:`find`, has an earlier occurrence."""
        self._extend(text)
        return tuple(self._tokens[-self.length :]) in self._ends

    def _extend(self, text: Tokens) -> None:
        """Note where runs end, all but the one at the very end: that one is looked for."""
        if len(self._tokens) == len(text):
            return
        if len(self._tokens) > len(text):  # tokens were taken back
            self._tokens, self._ends = [], {}
        first = max(self.length, len(self._tokens))
        self._tokens += text[len(self._tokens) :].tolist()
        for end in range(first, len(self._tokens)):
            self._ends[tuple(self._tokens[end - self.length : end])] = end


def _match(tokens: list[int], end: int, known: int) -> int:
    """Return how many tokens before ``end`` agree with the last ones, ``known`` of which do."""
    match, last = known, len(tokens) - 1
    while match < LONGEST_MATCH and match < end and tokens[end - 1 - match] == tokens[last - match]:
        match += 1
    return match


def splice(block: Block, lookup: Lookup, text: Tokens) -> None:
    """Replace the drafts behind a filled block's first unsure one, in place.

    Args:
        block: of self-speculation, seed first.
        lookup: the request's.
        text: int ``[tokens]``, prompt and text up to and with the seed.
    """
    unsure = next((place for place in range(1, block.length) if block.confidence[place] < UNSURE), block.length)
    found = lookup.find(text, block.length - unsure, block.tokens[1:unsure])
    if found is not None:
        end = unsure + len(found.tokens)
        block.tokens[unsure:end], block.confidence[unsure:end] = found.tokens, found.confidence()
