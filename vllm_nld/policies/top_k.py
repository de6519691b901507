"""Commit a fixed number of positions, the surest ones."""

from __future__ import annotations

from torch import Tensor

from vllm_nld.option import Option
from vllm_nld.policies.base import Need, Rows, ranks

TOKENS_PER_STEP = Option(
    "tokens_per_step",
    int | None,
    None,
    {"ge": 1, "le": 1 << 16},
    "Diffusion, samplers top_k and left_to_right: positions committed by a denoising forward. By default an even share "
    "of the block over max_denoising_steps, or 1.",
)


class TopK:
    """Commits the positions of highest confidence first."""

    name = "top_k"
    options = (TOKENS_PER_STEP,)
    needs: frozenset[Need] = frozenset()

    def select(self, rows: Rows) -> Tensor:
        return rows.masked & (ranks(rows.masked, rows.confidence) < rows.quotas())
