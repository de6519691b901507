"""vLLM's thinking budget on its first runner, in engines with drafts: ends of thinking are forced by position."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

FORCED = 1e9
"""The logit of a forced token, vLLM's own."""


def force_ends_by_position(sampler: Any, forced: Callable[[int, Sequence[int]], Sequence[int | None]]) -> None:
    """Have ends of thinking depend on the text alone, as on vLLM's second runner; idempotent.

    vLLM's own bookkeeping (``v1/sample/thinking_budget_state.py``) also depends on the steps that decided the text:

    - Before 0.32, in steps without drafts, all ends are forced in the row of the batch's first request.
    - After a forced end of one token, the next section's end comes one token late, unless a draft is rejected before.
    - A section that starts in the step in which another one ends is not seen.
    - A request that was preempted, or left out of a step, is counted anew, and not always alike.
    - Before 0.28, when two requests swap rows, the budget of one may then hold for both.

    Args:
        sampler: the plain one, which decides the token after each request's drafts, and does so first in each step.
        forced: returns for a row of the batch and its drafts which token is forced in the place of each draft and after
            them, or None; empty for a request without a budget.
    """
    original = sampler.forward
    if getattr(original, "forces_ends_by_position", False):
        return

    def apply(logits: Tensor, predict_bonus_token: bool, spec_token_ids: Sequence[Sequence[int]] | None) -> Tensor:
        """As vLLM's. Rows are the places of drafts, or with ``predict_bonus_token`` each request's place after them."""
        drafted = [()] * len(logits) if spec_token_ids is None else spec_token_ids
        places, tokens, first = list[int](), list[int](), 0
        for row, drafts in enumerate(drafted):
            ends = forced(row, drafts)
            for place, token in enumerate(ends[-1:] if predict_bonus_token else ends[:-1], first):
                if token is not None:
                    places.append(place)
                    tokens.append(token)
            first += 1 if predict_bonus_token else len(drafts)
        if places:
            where = torch.tensor([places, tokens], device=logits.device)
            logits[where[0], where[1]] = FORCED
        return logits

    @functools.wraps(original)
    def forward(logits: Tensor, sampling_metadata: Any, predict_bonus_token: bool = True, **others: Any) -> Any:
        holder = sampling_metadata.thinking_budget_state_holder
        if holder is not None:
            holder.update_state, holder.apply_to_logits = _keep_nothing, apply
        return original(logits, sampling_metadata, predict_bonus_token=predict_bonus_token, **others)

    forward.forces_ends_by_position = True  # type: ignore[attr-defined]
    sampler.forward = forward


def _keep_nothing(*_: Any, **__: Any) -> None:
    """Stand in for vLLM's bookkeeping."""
