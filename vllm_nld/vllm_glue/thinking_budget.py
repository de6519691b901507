"""vLLM's thinking budget in engines with drafts, on its first runner: each end of thinking at its place."""

from __future__ import annotations

import functools
from typing import Any


def repair_thinking_budget(runner: Any) -> None:
    """Have every request's thinking end where its budget does, in each of its thinking sections; idempotent.

    In an engine with drafts, the plain sampler decides the token after each request's drafts, if it has any. Three
    faults of ``v1/sample/thinking_budget_state.py`` are repaired before each of its steps:

    - Before 0.32, vLLM does not say so in steps without drafts. Then a request's rows are counted by its drafts, none,
      and all ends are forced in the row of the batch's first request.
    - That an end was forced after the drafts is noted (``bonus_token_forced``), because the drafts' rows come next. If
      the end has one token, the note stays. Then the next section's end comes one token late, unless a draft is
      rejected before.
    - Before 0.28, if a request with a budget swaps rows with one without, the budget then holds for both.
    """
    sampler = runner.rejection_sampler.sampler
    original = sampler.forward
    if getattr(original, "thinks_within_budgets", False):
        return

    @functools.wraps(original)
    def forward(logits: Any, sampling_metadata: Any, predict_bonus_token: bool = True, **others: Any) -> Any:
        holder = sampling_metadata.thinking_budget_state_holder
        if holder is not None:
            _mend(holder._state, runner)
        return original(logits, sampling_metadata, predict_bonus_token=predict_bonus_token, **others)

    forward.thinks_within_budgets = True  # type: ignore[attr-defined]
    sampler.forward = forward


def _mend(states: dict[int, dict[str, Any]], runner: Any) -> None:
    """Mend what is known of each row's thinking: see :func:`repair_thinking_budget`."""
    for row, request in enumerate(runner.input_batch.req_ids if states else ()):
        if row not in states:
            continue
        if runner.requests[request].sampling_params.thinking_token_budget is None:
            del states[row]
        elif not states[row]["in_end"]:
            states[row]["bonus_token_forced"] = False
