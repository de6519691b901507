"""Commit the positions that a trained predictor expects to stay as they are (``draft_pass/learned_sampler.py``)."""

from __future__ import annotations

from torch import Tensor

from vllm_nld.policies.base import Need, Rows
from vllm_nld.policies.confidence_threshold import THRESHOLD, above_threshold


class Learned:
    """Judges by the predicted probability that the chosen token is right."""

    name = "learned"
    options = (THRESHOLD,)
    needs: frozenset[Need] = frozenset({"learned"})

    def select(self, rows: Rows) -> Tensor:
        assert rows.learned is not None, "the draft pass computes what a policy needs"
        return above_threshold(rows, rows.learned)
