"""The proposer behind ``--speculative-config '{"model": "vllm_nld.SelfSpeculation"}'``.

vLLM calls it after every step: the causal pass has just verified the last drafts (or committed a diffusion block, or
finished a prefill), the cache holds exactly the decided tokens but the last, and that last token seeds the next block.

Drafts of self-speculation are filled before the call returns. A diffusion block that needs more forwards stays open:
its request is parked (:mod:`vllm_nld.proposer.parking`), and the causal passes of the others go on in between.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from vllm.config import VllmConfig
from vllm.logger import init_logger

from vllm_nld.auto.agreement import first_rank_decides
from vllm_nld.auto.mode import AutoMode
from vllm_nld.draft_pass.forward import DraftPass
from vllm_nld.draft_pass.memory import drafts_allowed
from vllm_nld.errors import NLDError
from vllm_nld.ops.noise import Noise
from vllm_nld.options import NLDOptions
from vllm_nld.proposer.blocks import Sizes
from vllm_nld.proposer.branching import Branching
from vllm_nld.proposer.causal_step import CausalStep
from vllm_nld.proposer.denoising import Denoising
from vllm_nld.proposer.parking import WorkerNote
from vllm_nld.proposer.proposal import Proposal
from vllm_nld.proposer.request_loras import TaskLoRAs
from vllm_nld.proposer.request_state import RequestState
from vllm_nld.proposer.requests import Requests
from vllm_nld.proposer.step_tokens import StepTokens, TokenArray
from vllm_nld.proposer.thinking import thinking_tokens
from vllm_nld.serving.admission import EngineTraits
from vllm_nld.serving.ledger import Ledger
from vllm_nld.serving.report import report
from vllm_nld.vllm_glue import cpu_repairs, scheduling
from vllm_nld.vllm_glue.rejection_sampler import pack_draft_probs

logger = init_logger("vllm.nld.proposer")


class SelfSpeculation:
    """Hands vLLM each request's next tokens to verify or to commit (vLLM's ``custom_class`` interface).

    What is called when:

    ===================  =========================================================================================
    At start-up
    ``__init__``         vLLM makes its model runner
    ``attach``           the worker has the runner; again if vLLM lowers ``max_model_len``
    ``load_model``       vLLM has loaded the target
    ``profile``          vLLM measures memory (GPU)
    ``measure_costs``    the worker has warmed up
    In every step
    ``begin_step``       before the causal pass
    ``forward``          in place of the causal pass
    ``is_diffusion``     while vLLM samples what the pass decides; so are ``noise_at``, ``draft_probs``, ``seed_draws``
    ``propose``          after that; not if the step had no tokens
    ``denoise_parked``   if the step had no tokens
    ``take_note``        at the end, for the scheduler
    ===================  =========================================================================================

    Attributes:
        sizes: what its blocks have in common.
        block_length: tokens of the longest block, seed included.
        draft_pass: fills blocks; made when the model is loaded.
        auto: auto mode's choices and prices.
        ledger: what was done so far.
        parks: whether requests are parked while their block is open; else a causal pass waits for the slowest block.
            Needs this extension's scheduler. Also off to measure what it saves.
        parked: the parked requests.
        pricing_seconds: what start-up may spend on timing forwards.
    """

    pricing_seconds = 2.0

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.vllm_config = vllm_config
        self.options = NLDOptions.from_vllm_config(vllm_config)
        self.sizes = Sizes.of(vllm_config)
        self.block_length = self.sizes.longest
        self.draft_pass: DraftPass | None = None
        self.auto = AutoMode(self.block_length, together=first_rank_decides)
        self.ledger = Ledger()
        self.parks = scheduling.parks_requests(vllm_config)
        self._branching = Branching(self.block_length, self.ledger, self.auto.costs, first_rank_decides)
        self._denoising = Denoising(self.sizes, self.ledger)
        self.parked = self._denoising.parked
        self._requests: Requests | None = None
        self._runner: Any = None
        self._tasks: TaskLoRAs | None = None
        self._cycle = self.auto.idle()
        self._step = CausalStep()
        self._left_at: float | None = None
        self._reporting: list[RequestState] = []
        if vllm_config.device_config.device_type == "cpu":
            cpu_repairs.repair_cpu_temperature()

    def load_model(self, target_model: Any) -> None:
        """Take the loaded target: its weights are the draft's weights."""
        traits = EngineTraits.of(self.vllm_config)
        sampler = None
        if traits.learned_sampler is not None:
            from vllm_nld.draft_pass.learned_sampler import LearnedSampler

            sampler = LearnedSampler.load(traits.learned_sampler).to(next(target_model.parameters()).device)
        self.draft_pass = DraftPass(self.vllm_config, target_model, sampler)
        self.draft_pass.activate_tasks = self._tasks
        adapter = "draft adapter" if self.draft_pass.has_adapter else "no draft adapter"
        logger.info(
            "Self-speculation is active: block length %d (1 seed + %d drafts), draft threshold %s, mode %s, %s",
            *(self.block_length, self.block_length - 1, self.options.draft_threshold, self.options.mode, adapter),
        )
        if not self.parks:
            why = scheduling.why_not_parked(self.vllm_config)
            logger.info("Parking is off, so causal passes wait while diffusion blocks are denoised: %s", why)

    def measure_costs(self) -> None:
        """Time forwards of growing size for auto mode, for about ``pricing_seconds`` (called by the worker)."""
        draft_pass, end = self._draft_pass(), time.perf_counter() + self.pricing_seconds
        largest = min(self.block_length * self.vllm_config.scheduler_config.max_num_seqs, draft_pass.max_tokens)
        self.auto.costs.measure(
            lambda size: draft_pass.time_forward(size, self.block_length),
            largest,
            lambda: first_rank_decides(lambda: time.perf_counter() < end),  # all ranks run each forward
        )

    def profile(self) -> None:
        """Use as much memory as drafting ever does (called while vLLM profiles it)."""
        self._draft_pass().profile(self.vllm_config.scheduler_config.max_num_seqs, self.block_length)

    def attach(self, runner: Any) -> None:
        """Let the proposer see the requests and the final length limit (called by the worker)."""
        self.sizes.max_model_len = runner.max_model_len
        self._runner = runner
        self._requests = Requests(runner, EngineTraits.of(self.vllm_config), thinking_tokens(self.vllm_config))
        if self.vllm_config.lora_config is not None:
            self._tasks = TaskLoRAs(runner, self.sizes.mask_token_id)

    def is_diffusion(self, row: int) -> bool:
        """Whether the request in a batch row decodes by diffusion."""
        return self._known_requests().is_diffusion(row)

    def draft_probs(self, metadata: Any) -> Tensor | None:
        """Return what the drafts of a step were drawn from, float32 ``[drafts, vocab]``; None if none was drawn.

        Args:
            metadata: vLLM's ``SpecDecodeMetadata`` of the step, in the order of the batch's rows.
        """
        by_row = self._known_requests().draft_probs(metadata.num_draft_tokens)
        return pack_draft_probs(metadata, by_row, self.sizes.vocab_size) if any(p is not None for p in by_row) else None

    def noise_at(self, row: int) -> tuple[Noise, int] | None:
        """Return the noise of a row whose drafts its seed verifies, and its first draft's position; or None."""
        return None if self.is_diffusion(row) else self._known_requests().noise_at(row)

    def seed_draws(self) -> None:
        """Seed vLLM's generators for the token that the step draws last in each row."""
        self._known_requests().seed_draws(self._step.drafted)

    def forced_ends(self, row: int, drafts: Sequence[int]) -> Sequence[int | None]:
        """Return which token a row's thinking budget forces in the place of each draft and after them, or None.

        Empty if the row's request has no budget.
        """
        return self._known_requests().forced_ends(row, drafts)

    def begin_step(self, scheduler_output: Any) -> None:
        """Record what the causal pass is about to run, and forget requests that are over (called by the worker).

        Args:
            scheduler_output: vLLM's ``SchedulerOutput``, without padding.
        """
        self._step = CausalStep.of(scheduler_output)
        for request_id in scheduler_output.finished_req_ids:
            state = self._known_requests().finish(request_id)
            if state is not None:
                if state.is_diffusion:
                    self._denoising.end(state)
                logger.debug("%s (mode %s): %s", request_id, state.options.mode, state.tally.summary())
        for request_id in getattr(scheduler_output, "preempted_req_ids", None) or ():
            self._known_requests().drop_drafts(request_id)
            self._denoising.preempt(request_id)

    def forward(self, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Run the causal pass, with the branches that were planned for it (in place of the runner's ``forward``).

        Admission keeps branches from engines that cannot run them.
        """
        states = self._known_requests().branching(self._step.scheduled)
        return self._branching.run(self._draft_pass(), forward, states, self._step, arguments)

    def denoise_parked(self) -> None:
        """Run some forwards although there is nothing for a causal pass to do (called by the worker)."""
        if not self.parked:
            return
        self._denoising.run(self._draft_pass(), [], others=False)
        self._denoising.announce(self._denoising.hand_out_done())
        self._left_at = time.perf_counter()

    def take_note(self) -> WorkerNote | None:
        """Return what the scheduler must know after a step; None if that is nothing."""
        reports = {state.request_id: report(state.origins, state.tally) for state in self._reporting}
        self._reporting = []
        if self.parks:
            return replace(self._denoising.take_note(), reports=reports)
        return WorkerNote(frozenset(), reports=reports) if reports else None

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: TokenArray,
        token_ids_cpu: TokenArray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Return the tokens that every batch row's next causal pass runs after its last token; empty for plain AR.

        Args:
            sampled_token_ids: per row, the tokens this step decided; empty while its prompt is being prefilled. The
                last one of a diffusion request is replaced where diffusion, not the causal pass, is to decide it.
            num_tokens_no_spec: ``[rows]``, decided tokens per row, this step's included.
            token_ids_cpu: ``[rows, max_model_len]``, written where a token is replaced.
            slot_mappings: unused: a draft pass writes nothing.
        """
        entered = time.perf_counter()
        requests = self._known_requests()
        states = {row: requests.at(row) for row, sampled in enumerate(sampled_token_ids) if sampled}
        tokens = StepTokens(sampled_token_ids, num_tokens_no_spec, token_ids_cpu)
        self._learn_from_step(states, tokens, entered)
        most = drafts_allowed(self._runner, len(states), self.sizes.vocab_size)
        proposal = Proposal(
            states,
            tokens,
            self._step,
            self._denoising,
            self._draft_pass(),
            self.auto,
            self._branching,
            most,
            self.parks,
        )
        self._cycle = proposal.cycle
        # Host time spent on planning and bookkeeping is charged to the next step, so that no time between two calls
        # goes unaccounted.
        self._left_at = entered + proposal.fill(self.ledger)
        return proposal.hand_out()

    def _known_requests(self) -> Requests:
        if self._requests is None:
            raise NLDError(
                f"worker_cls={self.vllm_config.parallel_config.worker_cls!r} did not introduce the model runner to the "
                "proposer; allowed: auto, or a subclass of vllm_nld.worker.NLDCPUWorker or "
                "vllm_nld.worker.NLDGPUWorker"
            )
        return self._requests

    def _learn_from_step(self, states: dict[int, RequestState], tokens: StepTokens, now: float) -> None:
        """Learn what the causal pass decided, and what it cost, host time included.

        Not the cost of passes that also ran a prefill; those with branches have a price of their own.
        """
        step = self._step
        prefills = {row for row, state in states.items() if step.is_prefill(state)}
        if self._left_at is not None and states and not prefills and len(states) == len(tokens.sampled):
            accepted = sum(len(tokens.sampled[row]) - 1 for row, state in states.items() if state.was_drafted_by_auto)
            added = self._branching.tokens
            finish = self._cycle.finish_branched if added else self._cycle.finish
            finish(len(states), step.tokens(states) + added, accepted, now - self._left_at)
        self._branching.learn(sum(map(len, tokens.sampled)), comparable=not prefills)
        for row, state in states.items():
            step.record(state, len(tokens.sampled[row]), row in prefills, self.ledger)
        self._reporting = [state for state in states.values() if state.options.report]

    def _draft_pass(self) -> DraftPass:
        assert self.draft_pass is not None, "vLLM calls load_model() before propose()"
        return self.draft_pass
