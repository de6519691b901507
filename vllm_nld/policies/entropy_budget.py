"""Commit positions as long as their entropies fit a budget."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_nld.option import Option
from vllm_nld.policies.base import Need, Rows, ranks

ENTROPY_BUDGET = Option(
    "entropy_budget",
    float,
    0.3,
    {"ge": 0.0, "le": 1e6},
    "Diffusion, sampler entropy_budget: commit positions in order of entropy while the sum of their entropies without "
    "the largest stays within this many nats.",
)


class EntropyBudget:
    """The longest prefix, by ascending entropy, whose sum without its largest member is within the budget."""

    name = "entropy_budget"
    options = (ENTROPY_BUDGET,)
    needs: frozenset[Need] = frozenset({"entropy"})

    def select(self, rows: Rows) -> Tensor:
        assert rows.entropy is not None, "the draft pass computes what a policy needs"
        order = ranks(rows.masked, -rows.entropy)
        masked_entropy = rows.entropy.masked_fill(~rows.masked, 0.0)
        ascending = torch.zeros_like(rows.entropy).scatter_(1, order, masked_entropy)
        # The largest member of a prefix in ascending order is its last, so this is the sum of those before it.
        before = (ascending.cumsum(1) - ascending).gather(1, order)
        return rows.masked & ((before <= rows.column(ENTROPY_BUDGET.name)) | (order == 0))
