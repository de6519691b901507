"""A request's branches between their planning and the end of the verification that runs them."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from vllm_nld.branches.places import Branch


@dataclass
class Pending:
    """A request's branches, until its next verification is over.

    Attributes:
        block: the tokens to verify, seed first.
        prefix: tokens before the block.
        branches: what is to be drafted with them.
        beyond: whether branches also look one position past their block.
        left: tokens that the request may still emit, those of the block included.
        hidden: of each branch that was run, ``[rows, hidden]``.
    """

    block: list[int]
    prefix: int
    branches: list[Branch]
    beyond: bool
    left: int
    hidden: dict[Branch, Tensor] = field(default_factory=dict)

    def rows(self, branch: Branch) -> int:
        """Return how many positions a branch predicts, its seed's included."""
        return min(branch.length + self.beyond, self.left - branch.after - 1)

    def keep(self, least: float) -> None:
        """Drop the branches that gain less."""
        self.branches = [branch for branch in self.branches if branch.gain >= least]

    def hit(self, prefix: int, seed: int) -> Branch | None:
        """Return the branch that was run for a block with this prefix and seed; a guessed one first."""
        found = {branch.guess: branch for branch in self.hidden if self.prefix + branch.after + 1 == prefix}
        return found.get(seed, found.get(None))
