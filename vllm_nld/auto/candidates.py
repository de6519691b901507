"""The requests that auto mode chooses for, and what it may choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from vllm_nld.auto.acceptance import Acceptance

GOOD_RATE = 0.9
"""Acceptance rate of a request that would be worth finding: where not even that pays, no request is probed."""


@dataclass
class Candidate:
    """A request in auto mode that could draft.

    Attributes:
        row: its row in the batch.
        acceptance: what is known of its drafts.
        longest: tokens of its longest possible block, seed included; at least 2.
        idle_steps: steps since it last drafted.
        found: for each draft that a lookup offers it, how likely it is accepted if those before it are.
    """

    row: int
    acceptance: Acceptance
    longest: int
    idle_steps: int = 0
    found: Sequence[float] = ()

    def offers(self, lengths: Sequence[int]) -> list[tuple[float, int, float]]:
        """Return its possible blocks, longest first: their last draft's chance, their length, their gain.

        Args:
            lengths: to choose from, ascending.
        """
        rate = self.acceptance.hopeful_rate
        possible = dict.fromkeys(min(length, self.longest) for length in reversed(lengths))
        return [(rate ** (n - 1), n, self.acceptance.hopeful_tokens(n) - 1) for n in possible]


class Choice(NamedTuple):
    """What the requests of a step do; a request in neither takes an AR step.

    Attributes:
        blocks: tokens of the block to draft, seed included, by row.
        lookups: looked-up drafts to verify without drafting, by row.
    """

    blocks: dict[int, int]
    lookups: dict[int, int]

    @property
    def drafts(self) -> bool:
        """Whether any request has drafts."""
        return bool(self.blocks or self.lookups)


ALL_AR = Choice({}, {})


def label(row: int, choice: Choice) -> tuple[str, int]:
    """Return what a row does: the mode, and the tokens that its next causal pass runs."""
    if row in choice.blocks:
        return "self_speculation", choice.blocks[row]
    return ("prompt_lookup", 1 + choice.lookups[row]) if row in choice.lookups else ("ar", 1)


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
    good = Acceptance(candidates[0].acceptance.prior, accepted=1e6 * GOOD_RATE, tested=1e6)
    return [replace(candidate, acceptance=good, found=()) for candidate in candidates]
