"""Commit the positions that are sure enough (the released code's default)."""

from __future__ import annotations

from torch import Tensor

from vllm_nld.option import Option
from vllm_nld.policies.base import Need, Rows, ranks

THRESHOLD = Option(
    "threshold",
    float,
    0.9,
    {"ge": 0.0, "le": 1.0},
    "Diffusion, samplers confidence_threshold and learned: commit the positions of at least this confidence, or this "
    "predicted probability to be right (and always the one of highest confidence).",
)


def above_threshold(rows: Rows, score: Tensor) -> Tensor:
    """Return the positions whose score reaches the threshold, and the position of highest confidence."""
    return rows.masked & ((score >= rows.column(THRESHOLD.name)) | (ranks(rows.masked, rows.confidence) == 0))


class ConfidenceThreshold:
    """Judges by the probability of the chosen token. A threshold of 0 commits everything at once."""

    name = "confidence_threshold"
    options = (THRESHOLD,)
    needs: frozenset[Need] = frozenset()

    def select(self, rows: Rows) -> Tensor:
        return above_threshold(rows, rows.confidence)
