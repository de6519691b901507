"""Parked requests: their diffusion block is denoised while causal passes go on without them.

No request then waits for another one's block. The worker denoises, the scheduler leaves parked requests out of causal
passes; each tells the other what it knows by a note on the objects that vLLM passes between the two anyway.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from vllm_nld.draft_pass.block import Block
from vllm_nld.proposer.request_state import RequestState

FORWARDS_PER_LOOK = 4
"""Denoising forwards that run in a row while no other request has anything to do. Then the scheduler looks for new
ones, which costs a fraction of a forward. A number and not a time, because all tensor-parallel ranks must agree."""


@dataclass(frozen=True)
class WorkerNote:
    """What a worker tells the scheduler after a step.

    Attributes:
        parked: requests that the next causal pass must leave out.
        finished: by request, the tokens to commit of blocks that became done while their request was not in the step.
        reports: by request, of those that want one and got tokens in the step.
    """

    parked: frozenset[str]
    finished: dict[str, list[int]] = field(default_factory=dict)
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class SchedulerNote:
    """What the scheduler tells the workers with a step.

    Attributes:
        others_wait: whether requests that this step leaves out, other than parked ones, may be in the next.
        share: tokens of the longest block for which the next step's budget is likely to have room in every request;
            None: any.
    """

    others_wait: bool = False
    share: int | None = None


class Parked:
    """The requests of a worker that are in the phase PARKED, in the order in which they came."""

    def __init__(self) -> None:
        self._states: dict[str, RequestState] = {}

    def __len__(self) -> int:
        return len(self._states)

    @property
    def ids(self) -> frozenset[str]:
        """Their ids."""
        return frozenset(self._states)

    @property
    def blocks(self) -> list[Block]:
        """Their blocks."""
        return [state.diffusion.block for state in self._states.values()]

    def park(self, state: RequestState, block: Block) -> None:
        """Take a request in until its block is done."""
        state.diffusion.park(block)
        self._states[state.request_id] = state

    def take_done(self, mask_token_id: int) -> list[RequestState]:
        """Remove and return the requests whose block is done; the caller hands their tokens out."""
        done = [state for state in self._states.values() if state.diffusion.block.is_done(mask_token_id)]
        for state in done:
            del self._states[state.request_id]
        return done

    def drop(self, request_id: str) -> RequestState | None:
        """Remove and return a request whose block is not going to be done here; None if it is not parked."""
        return self._states.pop(request_id, None)


def may_leave(forwards: int, unfinished: Collection[Block], parked: Parked, others: bool, mask_token_id: int) -> bool:
    """Whether denoising stops for a causal pass.

    Args:
        forwards: denoising forwards since the last causal pass.
        unfinished: blocks of the step whose causal pass cannot go on without them.
        parked: the requests that the causal pass leaves out.
        others: whether it would have something to do all the same.
        mask_token_id: id of the mask token.
    """
    if not all(block.is_done(mask_token_id) for block in unfinished):
        return False
    return others or forwards >= FORWARDS_PER_LOOK or any(block.is_done(mask_token_id) for block in parked.blocks)
