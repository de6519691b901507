"""Where a verify forward branches: what a branch is, what a policy knows, and the policies. It imports nothing.

The dense reference (:mod:`vllm_nld.reference.branches`) and the engine (:mod:`vllm_nld.proposer.branching`) share it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

RANKS = 4
"""Candidates of each position that a policy sees."""
BY_RANK = (0.45, 0.17, 0.08)
"""Given a rejection, how likely the verifier's token is the draft's second, third and fourth candidate: from a study of
the embedded checkpoint that is not in this repository."""
MASK_WORTH = 0.5
"""Tokens of a block drafted after a mask over those of one drafted after the right guess: an assumption, a little below
what that study saw (0.7)."""
SHORTEST = 2
"""Tokens of the shortest block with a draft."""
USUAL_LENGTH = 8
"""Tokens of a branch's block: on the embedded checkpoint longer ones gain nothing."""


def usual_length(count: int | str, length: int | None, block_length: int) -> int:
    """Return the tokens of a branch's block for what a request asks for."""
    return min(length or (block_length if count == "all" else USUAL_LENGTH), block_length)


@dataclass(frozen=True)
class Branch:
    """A block that is drafted in case verification ends at one place.

    Attributes:
        after: index in the verified block of the last token before the branch.
        guess: the token that the verifier may put there; None: a mask, for any token.
        length: tokens of the block, its seed included.
        gain: how likely it is hit where those chosen before it are not, and what a hit is worth: 1 is a draft forward.
    """

    after: int
    guess: int | None
    length: int
    gain: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Draft:
    """A drafted block, as far as a policy looks at it.

    Attributes:
        tokens: seed first.
        likely: the best candidates of each position, best first. The first entry is the seed's and not looked at.
            There may be one more than tokens: the position after the block.
        chances: their probabilities.
    """

    tokens: list[int]
    likely: list[list[int]]
    chances: list[list[float]]

    def ends(self) -> list[float]:
        """Return how likely verification ends after each token, as the draft's own probabilities have it."""
        reached, ends = 1.0, []
        for row in range(1, len(self.tokens)):
            right = self.chances[row][0]
            ends.append(reached * (1 - right))
            reached *= right
        return [*ends, reached]


Choice = Callable[[Draft, int], list[Branch]]
"""A policy: returns the branches to verify a draft with.

Its second argument is how many tokens are left to emit, the whole block included. It must not look at what a branch
drafts: whether a block is used may depend on the verifier's tokens only, or sampled text would be biased.
"""


def no_branches(draft: Draft, left: int) -> list[Branch]:
    """Return none: linear self-speculation."""
    return []


def every_place(length: int) -> Choice:
    """Return the policy of quadratic self-speculation: a mask branch of ``length`` tokens after every token."""

    def choose(draft: Draft, left: int) -> list[Branch]:
        places = range(len(draft.tokens))
        return [Branch(place, None, min(length, left - place - 1)) for place in places if left - place > SHORTEST]

    return choose


def likeliest_places(
    count: int, length: int, mask_worth: float = MASK_WORTH, by_rank: tuple[float, ...] = BY_RANK
) -> Choice:
    """Return the policy that takes the branches that are most likely to be hit.

    Args:
        count: most branches of a forward.
        length: tokens of a branch's block.
        mask_worth: tokens of a mask hit over those of a guessed one; 0: no mask branches.
        by_rank: see :data:`BY_RANK`.
    """

    def choose(draft: Draft, left: int) -> list[Branch]:
        gains: dict[tuple[int, int | None], float] = {}
        for place, end in enumerate(draft.ends()):
            if left - place > SHORTEST:
                gains |= {(place, token): gain for token, gain in _guesses(draft, place, end, by_rank)}
                if mask_worth:
                    gains[place, None] = end * mask_worth
        chosen: list[Branch] = []
        while len(chosen) < count and gains:
            place, guess = max(gains, key=lambda key: gains[key])
            gain = gains.pop((place, guess))
            chosen.append(Branch(place, guess, min(length, left - place - 1), gain))
            if guess is None:
                gains |= {key: own * (1 - mask_worth) for key, own in gains.items() if key[0] == place}
            elif (place, None) in gains:
                gains[place, None] -= gain * mask_worth
        return chosen

    return choose


def _guesses(draft: Draft, place: int, end: float, by_rank: tuple[float, ...]) -> list[tuple[int, float]]:
    """Return what the verifier may put after a place where it ends with chance ``end``, and how likely that is."""
    if place + 1 < len(draft.tokens):
        others = [token for token in draft.likely[place + 1] if token != draft.tokens[place + 1]]
        return [(token, end * share) for token, share in zip(others, by_rank, strict=False)]
    if place + 1 < len(draft.likely):  # the whole block is accepted, and the draft has looked one position further
        return [(t, end * chance) for t, chance in zip(draft.likely[place + 1], draft.chances[place + 1], strict=True)]
    return []
