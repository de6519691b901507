"""Parked requests: their diffusion block is denoised while causal passes go on without them.

Nobody then waits for another request's block. The worker denoises, the scheduler leaves parked requests out of causal
passes; each tells the other what it knows by a note on the objects that vLLM passes between the two anyway.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from vllm_nld.draft_pass.block import Block
from vllm_nld.proposer.requests import RequestState

FORWARDS_PER_LOOK = 4
"""Denoising forwards that run in a row while nobody else has anything to do. Then the scheduler looks for new requests,
which costs a fraction of a forward. A number and not a time, because all tensor-parallel ranks must agree on it."""


@dataclass(frozen=True)
class WorkerNote:
    """What a worker tells the scheduler after a step.

    Attributes:
        parked: requests that the next causal pass must leave out.
        finished: by request, the tokens to commit of blocks that became done while their request was not in the step.
    """

    parked: frozenset[str]
    finished: dict[str, list[int]] = field(default_factory=dict)


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
    """The parked requests of a worker, with their blocks."""

    def __init__(self) -> None:
        self._blocks: dict[str, tuple[RequestState, Block]] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._blocks

    @property
    def ids(self) -> frozenset[str]:
        """Ids of the parked requests."""
        return frozenset(self._blocks)

    @property
    def blocks(self) -> list[Block]:
        """Their blocks, in the order in which they were opened."""
        return [block for _, block in self._blocks.values()]

    def park(self, state: RequestState, block: Block) -> None:
        """Take a request in until its block is done."""
        self._blocks[state.request_id] = (state, block)

    def take_done(self, mask_token_id: int) -> list[tuple[RequestState, Block]]:
        """Remove and return the requests whose block is done."""
        done = [pair for pair in self._blocks.values() if pair[1].is_done(mask_token_id)]
        for state, _ in done:
            del self._blocks[state.request_id]
        return done

    def drop(self, request_id: str) -> tuple[RequestState, Block] | None:
        """Remove a request whose block is never going to be done here."""
        return self._blocks.pop(request_id, None)


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
