"""What auto mode chooses for the requests of a step, and the looked-up drafts that it may choose from."""

from __future__ import annotations

from collections.abc import Callable

from vllm_nld.auto.candidates import Candidate
from vllm_nld.auto.cycle import Cycle
from vllm_nld.auto.mode import AutoMode
from vllm_nld.draft_pass.prompt_lookup import Found
from vllm_nld.proposer.requests import RequestState
from vllm_nld.proposer.step_tokens import StepTokens

Longest = Callable[[int, RequestState, StepTokens], int]
"""Tokens of a row's longest possible block, seed included."""


def plan_step(
    auto: AutoMode,
    states: dict[int, RequestState],
    tokens: StepTokens,
    longest: Longest,
    requests: int,
    planned: int,
) -> tuple[Cycle, dict[int, Found]]:
    """Return the cycle that auto mode chose, and the looked-up drafts that it takes, by row.

    Args:
        auto: makes the choice.
        states: of the rows to choose for; there may be none.
        tokens: of the step.
        longest: limits a row's block.
        requests: requests in the next causal pass, others included.
        planned: tokens of that pass if these rows take AR steps.
    """
    if not states:
        return auto.idle(), {}
    found = {row: looked_up for row, state in states.items() if (looked_up := _look_up(row, state, tokens, longest))}
    chances = {row: states[row].chances_of_found(looked_up) for row, looked_up in found.items()}
    cycle = auto.replan(list(states), requests, planned, chances)
    if cycle is None:
        candidates = [
            Candidate(row, state.acceptance, limit, state.idle_steps, chances.get(row, ()))
            for row, state in states.items()
            if (limit := longest(row, state, tokens)) >= 2
        ]
        cycle = auto.plan(candidates, requests, planned)
        for candidate in candidates:
            states[candidate.row].note_choice(candidate.row in cycle.choice.blocks, 1 + cycle.steps)
    return cycle, {row: found[row].first(count) for row, count in cycle.choice.lookups.items()}


def _look_up(row: int, state: RequestState, tokens: StepTokens, longest: Longest) -> Found | None:
    if state.lookup is None:
        return None
    text = tokens.history(row)
    return state.lookup.find(text, longest(row, state, tokens) - 1) if state.lookup.may_find(text) else None
