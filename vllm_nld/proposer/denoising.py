"""The diffusion requests of a worker: which blocks they open, and which tokens of done blocks they hand out.

What a request is doing is its phase (:mod:`vllm_nld.proposer.diffusion`). Here is what goes with the transitions:
the request's tokens, its counts, and what the scheduler must know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vllm_nld.draft_pass.block import Block
from vllm_nld.draft_pass.forward import DraftPass
from vllm_nld.proposer.blocks import Sizes, diffusion_block
from vllm_nld.proposer.diffusion import Phase
from vllm_nld.proposer.parking import Parked, WorkerNote, may_leave
from vllm_nld.proposer.request_state import RequestState
from vllm_nld.proposer.step_tokens import StepTokens
from vllm_nld.serving.ledger import Ledger


class Opened(NamedTuple):
    """What the diffusion requests of a step do next, by row.

    Attributes:
        filling: blocks to fill before the step's drafts are returned.
        parked: blocks that may take longer: their requests have just been parked.
        rest: tokens to hand out at once, of blocks that are half committed.
    """

    filling: dict[int, Block]
    parked: dict[int, Block]
    rest: dict[int, list[int]]

    @property
    def tokens(self) -> int:
        """Tokens that the next causal pass runs for these requests besides one each."""
        return sum(map(len, self.rest.values())) + sum(block.length - 1 for block in self.filling.values())


class Denoising:
    """Opens the blocks of diffusion requests, and hands out the tokens of those that are done.

    Args:
        ledger: counts forwards and blocks.

    Attributes:
        sizes: the engine's.
        parked: the parked requests.
    """

    def __init__(self, sizes: Sizes, ledger: Ledger) -> None:
        self.parked = Parked()
        self.sizes, self._ledger = sizes, ledger
        self._finished: dict[str, list[int]] = {}

    def open(self, states: dict[int, RequestState], tokens: StepTokens, parks: bool) -> Opened:
        """Open the next block of each request, or go on with the one it has.

        Args:
            states: requests in mode diffusion that are not over, by row.
            tokens: of the step that has just been decided.
            parks: whether requests may be parked at all.
        """
        opened = Opened({}, {}, {})
        committing, interrupted = Phase.COMMITTING, Phase.INTERRUPTED  # slow to look up, in Python 3.11
        for row, state in states.items():
            request = state.diffusion
            if request.phase is committing:
                opened.rest[row] = self._hand_out_rest(row, state, tokens)
            elif request.phase is interrupted:
                block = opened.filling[row] = request.resume()
                decided = int(tokens.decided[row])
                assert block.prefix == decided - 2, "the resumption decides one token after the block's seed"
            elif (new := diffusion_block(state, self.sizes, *tokens.seed(row))) is not None:
                if parks and state.options.seed_first:
                    self.parked.park(state, new)
                    opened.parked[row] = new
                else:
                    request.fill(new)
                    opened.filling[row] = new
        return opened

    def run(self, draft_pass: DraftPass, blocks: Sequence[Block], others: bool) -> None:
        """Run forwards until some blocks are filled, and over parked requests' blocks until a causal pass is due.

        Args:
            draft_pass: runs them.
            blocks: for which the causal pass waits.
            others: whether that pass has something to do even if no parked request's block becomes done.
        """

        def leave(forwards: int) -> bool:
            return may_leave(forwards, blocks, self.parked, others, self.sizes.mask_token_id)

        draft_pass.run([*blocks, *self.parked.blocks], leave)

    def hand_out(self, row: int, state: RequestState, tokens: StepTokens) -> list[int]:
        """Return what a block that was filled in the step has after the token that is decided by now."""
        request = state.diffusion
        block, resumed = request.block, request.phase is Phase.RESUMED
        self._ledger.denoised(state.tally, block.passes)
        drafts = request.hand_out(self.sizes.mask_token_id)
        if resumed:
            # The resumption ran the seed again and sampled after it, where the block has a token of its own.
            return self._hand_out_rest(row, state, tokens)
        if not state.options.seed_first:
            tokens.replace_last(row, block.tokens[0], state)
        return drafts

    def hand_out_done(self) -> dict[str, list[int]]:
        """Return the tokens to commit of parked requests whose block is done, by request; they are parked no more."""
        done: dict[str, list[int]] = {}
        for state in self.parked.take_done(self.sizes.mask_token_id):
            self._ledger.denoised(state.tally, state.diffusion.block.passes)
            done[state.request_id] = state.diffusion.hand_out(self.sizes.mask_token_id)
        return done

    def _hand_out_rest(self, row: int, state: RequestState, tokens: StepTokens) -> list[int]:
        """Put a half-committed block's next token where the causal pass sampled one; return those after it."""
        token, rest = state.diffusion.take_next()
        tokens.replace_last(row, token, state)
        return rest[: max(0, self.sizes.max_model_len - int(tokens.decided[row]) - 1)]

    def preempt(self, request_id: str) -> None:
        """Stop denoising a request whose pages are gone."""
        state = self.parked.drop(request_id)
        if state is not None:
            self._count_dropped(state, state.diffusion.interrupt())

    def end(self, state: RequestState) -> None:
        """Let go of a request that is over."""
        self.parked.drop(state.request_id)
        self._count_dropped(state, state.diffusion.end())

    def _count_dropped(self, state: RequestState, passes: int | None) -> None:
        """Count the forwards already spent on a block that was dropped."""
        if passes is not None:
            self._ledger.denoised(state.tally, passes)

    def announce(self, drafts: dict[str, list[int]]) -> None:
        """Keep, for the scheduler, tokens to commit of requests that are not in the step."""
        self._finished |= drafts

    def take_note(self) -> WorkerNote:
        """Return what the scheduler must know after a step."""
        finished, self._finished = self._finished, {}
        return WorkerNote(self.parked.ids, finished)
