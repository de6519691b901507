"""Commit a fixed number of positions, from the left."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_nld.policies.base import Need, Rows, ranks
from vllm_nld.policies.top_k import TOKENS_PER_STEP


class LeftToRight:
    """Commits the leftmost positions first."""

    name = "left_to_right"
    options = (TOKENS_PER_STEP,)
    needs: frozenset[Need] = frozenset()

    def select(self, rows: Rows) -> Tensor:
        places = -torch.arange(rows.masked.shape[1], dtype=torch.float32).expand(len(rows.masked), -1)
        return rows.masked & (ranks(rows.masked, places) < rows.quotas())
