"""Drafts from what was said before: text that repeats itself, or its prompt, continues as it did the last time.

They take no forward. After a drafted block's first unsure draft, where verification would most likely stop, they
replace what was drafted. Where lengths are chosen (auto mode), they can also stand on their own, without a draft
forward. ``benchmarks/draft_hints.py`` compares ways of combining.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Self

from vllm_nld.draft_sources.base import Drafts, DraftSource, NewRequest, Text
from vllm_nld.draft_sources.calibration import ChanceClass
from vllm_nld.option import Option
from vllm_nld.origins import LOOKED_UP

LONGEST_MATCH = 16
"""Matches are not followed back any further."""
MATCH_CLASSES = (4, 6, 9, LONGEST_MATCH)
"""Shortest matches of the classes above the lowest: the longer the match, the more it promises."""
FIRST = tuple(
    ChanceClass(f"looked up, first, match class {i}", x, LOOKED_UP) for i, x in enumerate((0.5, 0.6, 0.7, 0.8, 0.9))
)
"""Of the first draft of a run, by match: it is less certain than the others."""
LATER = tuple(
    ChanceClass(f"looked up, later, match class {i}", x, LOOKED_UP) for i, x in enumerate((0.7, 0.75, 0.8, 0.85, 0.9))
)
"""Of the others."""


@dataclass(frozen=True)
class Found:
    """What an earlier place suggests.

    Attributes:
        tokens: what followed there.
        match: how many tokens before agree with the end of the text, at most ``LONGEST_MATCH``.
    """

    tokens: list[int]
    match: int

    def drafts(self) -> Drafts:
        """Return them as drafts of their match's class."""
        level = bisect_right(MATCH_CLASSES, self.match)
        return Drafts(list(self.tokens), [FIRST[level]] + [LATER[level]] * (len(self.tokens) - 1))


class Lookup:
    """A text's runs of ``length`` tokens, and where each of them ended last; grows with the text.

    Args:
        length: how many tokens must match.
        never: tokens that are never suggested, nor what follows them, though a prompt may hold them.
    """

    def __init__(self, length: int, never: frozenset[int]) -> None:
        self.length, self._never = length, never
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}

    def find(self, text: Text, most: int, drafts: Sequence[int] = ()) -> Found | None:
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
        if not self._never.isdisjoint(found):
            found = list(takewhile(lambda token: token not in self._never, found))
        return Found(found, _match(tokens, end, length)) if found else None

    def may_find(self, text: Text) -> bool:
        """Whether the end of the text, as for :meth:`find`, has an earlier occurrence."""
        self._extend(text)
        return tuple(self._tokens[-self.length :]) in self._ends

    def _extend(self, text: Text) -> None:
        """Note where runs end, all but the one at the very end: that one is looked for."""
        if len(self._tokens) == len(text):
            return
        if len(self._tokens) > len(text):  # tokens were taken back
            self._tokens, self._ends = [], {}
        first = max(self.length, len(self._tokens))
        self._tokens += text[len(self._tokens) :].tolist()
        for end in range(first, len(self._tokens)):
            self._ends[tuple(self._tokens[end - self.length : end])] = end


class PromptLookup(DraftSource):
    """Looks up what followed the last tokens of the text, and of sure drafts, before."""

    name = "prompt_lookup"
    options = (
        Option(
            "prompt_lookup",
            int,
            3,
            {"ge": 0, "le": 16},
            "Self-speculation. After the first unsure draft, draft what followed this many last tokens at their latest "
            "earlier occurrence in prompt and text (drawn drafts are not replaced); in auto mode, also do this instead "
            "of drafting. 0 turns it off.",
        ),
    )
    takes_forward = False

    def __init__(self, length: int, never: frozenset[int]) -> None:
        self._lookup = Lookup(length, never)

    @classmethod
    def open(cls, request: NewRequest) -> Self | None:
        length = request.values["prompt_lookup"]
        return cls(length, request.never_drafted) if length and request.knows_prompt else None

    def offer(self, text: Text, most: Callable[[], int], after: Sequence[int] = ()) -> Drafts | None:
        if not after and not self._lookup.may_find(text):
            return None
        found = self._lookup.find(text, most(), after)
        return None if found is None else found.drafts()


def _match(tokens: list[int], end: int, known: int) -> int:
    """Return how many tokens before ``end`` agree with the last ones, ``known`` of which do."""
    match, last = known, len(tokens) - 1
    while match < LONGEST_MATCH and match < end and tokens[end - 1 - match] == tokens[last - match]:
        match += 1
    return match
