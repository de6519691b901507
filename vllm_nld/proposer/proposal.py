"""One answer to vLLM's question for drafts: planned, filled, handed out."""

from __future__ import annotations

import time

from vllm_nld.auto.cycle import Cycle
from vllm_nld.auto.mode import AutoMode
from vllm_nld.draft_pass.forward import DraftPass
from vllm_nld.proposer.branching import Branching, Drafted
from vllm_nld.proposer.causal_step import CausalStep
from vllm_nld.proposer.denoising import Denoising
from vllm_nld.proposer.request_state import RequestState
from vllm_nld.proposer.speculation import Speculation
from vllm_nld.proposer.step_tokens import StepTokens
from vllm_nld.serving.ledger import Ledger


class Proposal:
    """What the requests of a step run next. It plans when made; then :meth:`fill`, then :meth:`hand_out`.

    Args:
        states: requests of the step for which it decided tokens, by row.
        tokens: of the step.
        step: the causal pass that has just run.
        denoising: has the diffusion requests.
        draft_pass: fills the blocks.
        auto: chooses for requests in auto mode.
        branching: has the branches.
        most_drafts: of each request, as far as memory is concerned.
        parks: whether requests may be parked.

    Attributes:
        cycle: what auto mode chose.
    """

    def __init__(
        self,
        states: dict[int, RequestState],
        tokens: StepTokens,
        step: CausalStep,
        denoising: Denoising,
        draft_pass: DraftPass,
        auto: AutoMode,
        branching: Branching,
        most_drafts: int,
        parks: bool,
    ) -> None:
        self._states, self._tokens, self._step = states, tokens, step
        self._denoising, self._draft_pass, self._branching = denoising, draft_pass, branching
        sizes = denoising.sizes
        diffusion: dict[int, RequestState] = {}
        speculative: dict[int, RequestState] = {}
        for row, state in states.items():
            if state.options.mode != "ar" and not state.is_over(tokens.sampled[row]):
                (diffusion if state.is_diffusion else speculative)[row] = state
        self._opened = denoising.open(diffusion, tokens, parks)
        self._speculation = Speculation(speculative, tokens, sizes, min(step.share or sizes.longest, 1 + most_drafts))
        requests = len(states) - len(self._opened.parked)
        self._given = requests + self._opened.tokens
        self.cycle: Cycle = self._speculation.plan(auto, requests, self._given)
        branching.choose_way([states[row] for row in self._speculation.blocks])
        self._speculation.look_past(branching.looks_past, draft_pass.max_tokens, most_drafts)
        mask = sizes.mask_token_id
        empty = {row: block for row, block in self._opened.filling.items() if not block.is_done(mask)}
        located = empty | self._speculation.blocks | self._opened.parked
        draft_pass.locate([*located], [*located.values()])

    def fill(self, ledger: Ledger) -> float:
        """Fill the step's blocks, and carry on with those of parked requests as long as no request waits.

        Returns:
            Seconds that the forwards took.
        """
        blocks = [*self._opened.filling.values(), *self._speculation.blocks.values()]
        mixed, others = len(self._denoising.parked) > 0, self._others()
        self._branching.use(self._draft_pass, self._states, self._speculation.blocks)
        started = time.perf_counter()
        self._denoising.run(self._draft_pass, blocks, others)
        seconds = time.perf_counter() - started
        for row, block in self._speculation.blocks.items():
            ledger.drafted(self._states[row].tally, block.passes)
        ran = [block for block in blocks if block.passes]
        if mixed:
            # The forward and the causal pass also serve blocks that auto mode did not plan for.
            self.cycle.void()
        elif ran and all(block.passes == 1 for block in ran):
            self.cycle.drafted(sum(block.length for block in ran), seconds)
        self._speculation.collect()
        self._speculation.trim(self.cycle, self._given, seconds)
        return seconds

    def _others(self) -> bool:
        """Whether the next causal pass has something to do even if no parked request's block becomes done."""
        if self._step.others_wait or len(self._states) < len(self._tokens.sampled):
            return True
        parked = self._opened.parked
        return any(row not in parked and not self._ends(row, state) for row, state in self._states.items())

    def _ends(self, row: int, state: RequestState) -> bool:
        """Whether a request is certain to be over, so that no causal pass follows."""
        full = int(self._tokens.decided[row]) >= self._denoising.sizes.max_model_len
        return full or state.remaining(1) <= 0 or state.is_over(self._tokens.sampled[row])

    def hand_out(self) -> list[list[int]]:
        """Return the tokens of the next causal pass after each row's last; the scheduler is told of others'."""
        speculative = self._speculation.hand_out()
        drafted = [
            Drafted(self._states[row], block, speculative[row], self._speculation.left(row))
            for row, block in self._speculation.blocks.items()
        ]
        self._branching.plan(drafted, self._given + sum(map(len, speculative.values())))
        drafts = self._opened.rest | speculative
        for row in self._opened.filling:
            drafts[row] = self._denoising.hand_out(row, self._states[row], self._tokens)
        done = self._denoising.hand_out_done()
        for row in self._opened.parked:
            drafts[row] = done.pop(self._states[row].request_id, [])
        self._denoising.announce(done)
        return [drafts.get(row, []) for row in range(len(self._tokens.sampled))]
