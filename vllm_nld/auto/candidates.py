"""The requests that auto mode chooses for, and what it may choose. Draft sources are names here, no more."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

from vllm_nld.draft_sources.acceptance import Acceptance
from vllm_nld.draft_sources.base import ByForward

GOOD_RATE = 0.9
"""Acceptance rate of a request that would be worth finding: where not even that pays, no request is probed."""


class AtHand(NamedTuple):
    """Drafts that a source has without a draft forward.

    Attributes:
        source: its name.
        chances: for each draft, how likely it is accepted if those before it are.
    """

    source: str
    chances: Sequence[float]


class Taken(NamedTuple):
    """How many of a source's drafts at hand are verified."""

    source: str
    drafts: int


@dataclass
class Candidate:
    """A request in auto mode that could draft.

    Attributes:
        row: its row in the batch.
        forward: what a draft forward would yield.
        at_hand: what can be verified without one; None if there is nothing.
    """

    row: int
    forward: ByForward
    at_hand: AtHand | None = None

    def offers(self, lengths: Sequence[int]) -> list[tuple[float, int, float]]:
        """Return its possible blocks, longest first: their last draft's chance, their length, their gain.

        Args:
            lengths: to choose from, ascending.
        """
        acceptance, longest = self.forward.acceptance, self.forward.longest
        rate = acceptance.hopeful_rate
        possible = dict.fromkeys(min(length, longest) for length in reversed(lengths))
        return [(rate ** (n - 1), n, acceptance.hopeful_tokens(n) - 1) for n in possible]


class Choice(NamedTuple):
    """What the requests of a step do; a request in neither takes an AR step.

    Attributes:
        blocks: tokens of the block to draft by a forward, seed included, by row.
        at_hand: drafts to verify without drafting, by row.
    """

    blocks: dict[int, int]
    at_hand: dict[int, Taken]

    @property
    def drafts(self) -> bool:
        """Whether any request has drafts."""
        return bool(self.blocks or self.at_hand)

    @property
    def tokens_at_hand(self) -> int:
        """Drafts that are verified without a draft forward."""
        return sum(taken.drafts for taken in self.at_hand.values())


ALL_AR = Choice({}, {})


def most_promising(offers: Sequence[AtHand]) -> AtHand:
    """Return the drafts of which the most are accepted on average, if all are verified."""
    if len(offers) == 1:
        return offers[0]
    return max(offers, key=lambda offer: sum(accumulate(offer.chances, operator.mul)))


def label(row: int, choice: Choice, forward_source: Mapping[int, str]) -> tuple[str, int]:
    """Return what a row does: the source of its drafts or ``ar``, and the tokens that its next causal pass runs.

    Args:
        row: of the batch.
        choice: made for it.
        forward_source: the source that a draft forward's drafts come from, by row.
    """
    if row in choice.blocks:
        return forward_source[row], choice.blocks[row]
    taken = choice.at_hand.get(row)
    return ("ar", 1) if taken is None else (taken.source, 1 + taken.drafts)


def longest_blocks_above(
    candidates: Sequence[Candidate], offers: Sequence[list[tuple[float, int, float]]], least: float
) -> tuple[dict[int, int], float]:
    """Return the longest blocks whose last drafts have at least this chance to be accepted, and their gain in all."""
    blocks, gained = dict[int, int](), 0.0
    for candidate, own in zip(candidates, offers, strict=True):
        for chance, length, gain in own:
            if chance >= least:
                blocks[candidate.row] = length
                gained += gain
                break
    return blocks, gained


def assume_good(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates as they would be if their drafts were good."""
    good = Acceptance(candidates[0].forward.acceptance.prior, accepted=1e6 * GOOD_RATE, tested=1e6)
    return [Candidate(own.row, replace(own.forward, acceptance=good)) for own in candidates]
