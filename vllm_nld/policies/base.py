"""The protocol of a selection policy, and the arguments of its methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from vllm_nld.option import Option

Need = Literal["entropy", "learned"]
"""Values that a policy may need besides confidence: a position's entropy, or the learned sampler's score."""


@dataclass(frozen=True)
class Rows:
    """The rows of a forward that share a policy.

    Attributes:
        masked: bool ``[rows, length]``, the undecided positions.
        confidence: float32 ``[rows, length]``, the chosen token's probability.
        entropy: float32 ``[rows, length]``, nats, if the policy needs it.
        learned: float32 ``[rows, length]``, the learned sampler's scores, if the policy needs them: 1 where committing
            the token should change nothing.
        values: each row's values of the policy's options.
        passes: forwards that each row's block has taken before this one.
        max_steps: forwards that each row's block may take; None: no limit.
    """

    masked: Tensor
    confidence: Tensor
    entropy: Tensor | None
    learned: Tensor | None
    values: Sequence[Mapping[str, Any]]
    passes: Sequence[int]
    max_steps: Sequence[int | None]

    def column(self, option: str) -> Tensor:
        """Return each row's value of an option, float32 ``[rows, 1]``."""
        return torch.tensor([float(own[option]) for own in self.values])[:, None]

    def quotas(self) -> Tensor:
        """Return how many positions to commit with a fixed count, int64 ``[rows, 1]``.

        ``tokens_per_step``; if that is None, an even share of the positions over the remaining forwards, or 1.
        """
        quotas = []
        for own, masked, passes, steps in zip(self.values, self.masked, self.passes, self.max_steps, strict=True):
            if own["tokens_per_step"] is not None:
                quotas.append(own["tokens_per_step"])
            else:
                quotas.append(1 if steps is None else -(-int(masked.sum()) // max(1, steps - passes)))
        return torch.tensor(quotas)[:, None]


class Policy(Protocol):
    """One policy. It commits at least one masked position of every row, or a block would never finish."""

    @property
    def name(self) -> str:
        """Its name in ``nld.sampler``."""

    @property
    def options(self) -> Sequence[Option]:
        """The options that it reads. They are declared to users, checked at admission and passed to :meth:`select`."""

    @property
    def needs(self) -> frozenset[Need]:
        """What the draft pass must compute for it. Each need takes the whole distribution of every position."""

    def select(self, rows: Rows) -> Tensor:
        """Return the positions to commit, bool ``[rows, length]``, a subset of ``rows.masked``.

        Called after every forward, except a block's last allowed one, which commits all remaining positions.
        """


def ranks(masked: Tensor, score: Tensor) -> Tensor:
    """Return each masked position's rank by descending score, int64 ``[rows, length]``; unmasked ones come last.

    Ties go to the left position.
    """
    order = score.masked_fill(~masked, -torch.inf).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(score.shape[1]).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)
