"""The proposer behind ``--speculative-config '{"model": "vllm_nld.SelfSpeculation"}'``.

vLLM calls it after every step: the causal pass has just verified the last drafts (or committed a diffusion block, or
finished a prefill), the cache holds exactly the decided tokens but the last, and that last token seeds the next block.

Drafts of self-speculation are filled before the call returns. A diffusion block that needs more forwards stays open:
its request is parked (:mod:`vllm_nld.proposer.parking`), and the causal passes of the others go on in between.
"""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor
from vllm.config import VllmConfig
from vllm.logger import init_logger

from vllm_nld.auto.agreement import first_rank_decides
from vllm_nld.auto.mode import AutoMode
from vllm_nld.draft_pass.block import Block
from vllm_nld.draft_pass.forward import DraftPass
from vllm_nld.draft_pass.memory import drafts_allowed
from vllm_nld.draft_pass.prompt_lookup import splice
from vllm_nld.draft_pass.token_choice import DraftChoice
from vllm_nld.errors import NLDError
from vllm_nld.ops.noise import Noise
from vllm_nld.ops.sizes import round_size
from vllm_nld.options import NLDOptions
from vllm_nld.proposer.auto_step import plan_step
from vllm_nld.proposer.parking import Parked, SchedulerNote, WorkerNote, may_leave
from vllm_nld.proposer.request_loras import TaskLoRAs
from vllm_nld.proposer.requests import Requests, RequestState
from vllm_nld.proposer.step_tokens import StepTokens, TokenArray
from vllm_nld.proposer.thinking import thinking_tokens
from vllm_nld.serving.admission import EngineTraits
from vllm_nld.serving.ledger import Ledger
from vllm_nld.vllm_glue import cpu_repairs, scheduling, steps
from vllm_nld.vllm_glue.rejection_sampler import pack_draft_probs

logger = init_logger("vllm.nld.proposer")


class SelfSpeculation:
    """Hands vLLM each request's next tokens to verify or to commit (vLLM's ``custom_class`` interface).

    Attributes:
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
        self.block_length: int = 1 + vllm_config.speculative_config.num_speculative_tokens
        self.vocab_size: int = vllm_config.model_config.get_vocab_size()
        self.mask_token_id: int = vllm_config.model_config.hf_config.mask_token_id
        self.max_model_len: int = vllm_config.model_config.max_model_len
        self.draft_pass: DraftPass | None = None
        self.auto = AutoMode(self.block_length, together=first_rank_decides)
        self._cycle = self.auto.idle()
        self.ledger = Ledger()
        self._requests: Requests | None = None
        self._runner: Any = None
        self._most_drafts = self.block_length - 1
        self._tasks: TaskLoRAs | None = None
        self._scheduled: dict[str, int] = {}
        self._drafted: dict[str, list[int]] = {}
        self._left_at: float | None = None
        self._draft_seconds = 0.0
        self.parks = scheduling.parks_requests(vllm_config)
        self.parked = Parked()
        self._others_wait, self._share = False, self.block_length
        self._finished_away: dict[str, list[int]] = {}
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
        logger.info(
            "Self-speculation is active: block length %d (1 seed + %d drafts), draft threshold %s, mode %s, %s",
            self.block_length,
            self.block_length - 1,
            self.options.draft_threshold,
            self.options.mode,
            "draft adapter" if self.draft_pass.has_adapter else "no draft adapter",
        )
        if not self.parks:
            logger.info(
                "Parking is off, so causal passes wait while diffusion blocks are denoised: %s",
                scheduling.why_not_parked(self.vllm_config),
            )

    def measure_costs(self) -> None:
        """Time forwards of growing size for auto mode, for about ``pricing_seconds`` (called by the worker)."""
        assert self.draft_pass is not None, "vLLM loads the model before it warms up"
        largest = min(self.block_length * self.vllm_config.scheduler_config.max_num_seqs, self.draft_pass.max_tokens)
        size, end = 4, time.perf_counter() + self.pricing_seconds
        while size <= largest and first_rank_decides(lambda: time.perf_counter() < end):  # all ranks run each forward
            times = [self.draft_pass.time_forward(size, self.block_length) for _ in range(3)]
            self.auto.costs.start(size, min(times))  # the first one compiles kernels
            size = round_size(size + 1)

    def profile(self) -> None:
        """Use as much memory as drafting ever does (called while vLLM profiles it)."""
        self._draft_pass().profile(self.vllm_config.scheduler_config.max_num_seqs, self.block_length)

    def attach(self, runner: Any) -> None:
        """Let the proposer see the requests and the final length limit (called by the worker)."""
        self.max_model_len = runner.max_model_len
        self._runner = runner
        self._requests = Requests(runner, EngineTraits.of(self.vllm_config), thinking_tokens(self.vllm_config))
        if self.vllm_config.lora_config is not None:
            self._tasks = TaskLoRAs(runner, self.mask_token_id)

    def is_diffusion(self, row: int) -> bool:
        """Whether the request in a batch row decodes by diffusion; vLLM's warm-up samples rows without requests."""
        requests = self._known_requests()
        return row < requests.rows and requests.at(row).is_diffusion

    def draft_probs(self, metadata: Any) -> Tensor | None:
        """Return what the drafts of a step were drawn from, float32 ``[drafts, vocab]``; None if none was drawn.

        Args:
            metadata: vLLM's ``SpecDecodeMetadata`` of the step, in the order of the batch's rows.
        """
        requests = self._known_requests()
        by_row = [
            requests.at(row).draft_probs if count and row < requests.rows else None
            for row, count in enumerate(metadata.num_draft_tokens)
        ]
        return pack_draft_probs(metadata, by_row, self.vocab_size) if any(p is not None for p in by_row) else None

    def noise_at(self, row: int) -> tuple[Noise, int] | None:
        """Return the noise of a row whose drafts its seed verifies, and its first draft's position; or None."""
        return None if self.is_diffusion(row) else self._known_requests().noise_at(row)

    def seed_draws(self) -> None:
        """Seed vLLM's generators for the token that the step draws last in each row."""
        self._known_requests().seed_draws(self._drafted)

    def begin_step(self, scheduler_output: Any) -> None:
        """Record what the causal pass is about to run, and forget requests that are over (called by the worker).

        Args:
            scheduler_output: vLLM's ``SchedulerOutput``, without padding.
        """
        self._scheduled = scheduler_output.num_scheduled_tokens
        self._drafted = scheduler_output.scheduled_spec_decode_tokens
        note = steps.note_on(scheduler_output)
        known = note if isinstance(note, SchedulerNote) else SchedulerNote()
        self._others_wait, self._share = known.others_wait, known.share or self.block_length
        for request_id in scheduler_output.finished_req_ids:
            self._unpark(request_id)
            state = self._known_requests().finish(request_id)
            if state is not None:
                self._abandon(state)
                logger.debug("%s (mode %s): %s", request_id, state.options.mode, state.tally.summary())
        for request_id in getattr(scheduler_output, "preempted_req_ids", None) or ():
            self._known_requests().drop_drafts(request_id)
            state = self._unpark(request_id)
            if state is not None and not state.may_replace_sampled:
                self._abandon(state)  # the resumption samples a token that the block would have to replace

    def _unpark(self, request_id: str) -> RequestState | None:
        """Take a request out of denoising that is over, or whose pages are gone; return its state if it was parked."""
        pair = self.parked.drop(request_id)
        if pair is None:
            return None
        state, block = pair
        block.pages = None
        state.interrupted = block
        return state

    def _abandon(self, state: RequestState) -> None:
        """Count the forwards already spent on a block that will be dropped."""
        if state.interrupted is not None:
            self.ledger.denoised(state.tally, state.interrupted.passes)
            state.interrupted = None

    def denoise_parked(self) -> None:
        """Run some forwards although there is nothing for a causal pass to do (called by the worker)."""
        if not self.parked:
            return
        self._run([], others=False)
        self._finished_away |= self._hand_out_parked()
        self._left_at = time.perf_counter()

    def take_note(self) -> WorkerNote | None:
        """Return what the scheduler must know after a step; None if no request is ever parked."""
        if not self.parks:
            return None
        finished, self._finished_away = self._finished_away, {}
        return WorkerNote(self.parked.ids, finished)

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
        rows = [row for row, sampled in enumerate(sampled_token_ids) if sampled]
        states = {row: requests.at(row) for row in rows}
        self._time_step(states, sampled_token_ids, entered)
        for row, state in states.items():
            self._settle(state, sampled_token_ids[row])
        tokens = StepTokens(sampled_token_ids, num_tokens_no_spec, token_ids_cpu)
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        blocks = self._blocks(states, tokens, drafts)
        waits = {row for row, state in states.items() if state.request_id in self.parked}
        others = self._others_wait or len(rows) < len(drafts)
        others = others or any(row not in waits and not self._ends(row, states[row], tokens) for row in states)
        self._fill(blocks, states, tokens, len(rows) - len(waits) + sum(map(len, drafts)), others)
        for row, block in blocks.items():
            drafts[row] = self._hand_out(row, states[row], block, tokens)
        done = self._hand_out_parked()
        for row in waits:
            drafts[row] = done.pop(states[row].request_id, [])
        self._finished_away |= done
        # Host time spent on planning and bookkeeping is charged to the next step, so that no time between two calls
        # goes unaccounted.
        self._left_at = entered + self._draft_seconds
        return drafts

    def _ends(self, row: int, state: RequestState, tokens: StepTokens) -> bool:
        """Whether a request is certain to be over, so that no causal pass follows."""
        full = int(tokens.decided[row]) >= self.max_model_len
        return full or state.remaining(1) <= 0 or state.is_over(tokens.sampled[row])

    def _known_requests(self) -> Requests:
        if self._requests is None:
            raise NLDError(
                f"worker_cls={self.vllm_config.parallel_config.worker_cls!r} did not introduce the model runner to the "
                "proposer; allowed: auto, or a subclass of vllm_nld.worker.NLDCPUWorker or "
                "vllm_nld.worker.NLDGPUWorker"
            )
        return self._requests

    def _time_step(self, states: dict[int, RequestState], sampled: list[list[int]], now: float) -> None:
        """Learn what the causal step yielded and cost, host time included, unless a prefill was part of it."""
        if self._left_at is None or len(states) < len(sampled) or not states:
            return
        if any(state.is_prefill(self._scheduled, self._drafted) for state in states.values()):
            return
        tokens = sum(self._scheduled.get(state.request_id, 0) for state in states.values())
        accepted = sum(len(sampled[row]) - 1 for row, state in states.items() if state.is_adaptive and state.drafted)
        self._cycle.finish(len(states), tokens, accepted, now - self._left_at)

    def _settle(self, state: RequestState, sampled: list[int]) -> None:
        """Record the causal pass that has just decided ``sampled``."""
        state.draft_probs = None
        drafts = len(self._drafted.get(state.request_id, ()))
        accepted = len(sampled) - 1
        prefill = state.is_prefill(self._scheduled, self._drafted)
        if state.is_diffusion:
            kind, mode = "commit", "diffusion"
            state.pending = state.pending[drafts:]
        elif drafts:
            kind = mode = "verify"
            mode = "self_speculation"
            state.learn(drafts, accepted)
        else:
            kind = "ar"
            mode = "self_speculation" if state.options.mode == "self_speculation" and prefill else "ar"
        self.ledger.causal(state.tally, "prefill" if prefill else kind, mode, len(sampled), accepted)

    def _blocks(self, states: dict[int, RequestState], tokens: StepTokens, drafts: list[list[int]]) -> dict[int, Block]:
        """Return the blocks to fill now, by row, and park requests whose block may take longer.

        Those of looked-up drafts are full. Where a diffusion block is only half committed, its rest is handed out.
        """
        self._most_drafts = drafts_allowed(self._runner, len(states), self.vocab_size)
        blocks: dict[int, Block] = {}
        opened: dict[int, Block] = {}
        adaptive: dict[int, RequestState] = {}
        for row, state in states.items():
            if state.options.mode == "ar" or state.is_over(tokens.sampled[row]):
                continue
            if state.is_diffusion:
                block = self._diffusion(row, state, tokens, drafts)
                if block is not None:
                    parks = self.parks and state.options.seed_first and state.interrupted is None
                    (opened if parks else blocks)[row] = block
            elif state.is_adaptive:
                adaptive[row] = state
            elif state.options.mode == "self_speculation":
                longest = self._longest(row, state, tokens)
                if longest >= 2:
                    blocks[row] = self._draft_block(row, state, tokens, longest)
        requests = len(states) - len(opened)
        planned = requests + sum(map(len, drafts)) + sum(block.length - 1 for block in blocks.values())
        self._cycle, found = plan_step(self.auto, adaptive, tokens, self._longest, requests, planned)
        for row, length in self._cycle.choice.blocks.items():
            blocks[row] = self._draft_block(row, states[row], tokens, length)
        for row, looked_up in found.items():
            blocks[row] = looked_up.block(*tokens.seed(row))
        empty = {row: block for row, block in blocks.items() if not block.is_done(self.mask_token_id)}
        self._draft_pass().locate(empty | opened)
        for row, block in opened.items():
            self.parked.park(states[row], block)
        return blocks

    def _longest(self, row: int, state: RequestState, tokens: StepTokens) -> int:
        room = self.max_model_len - int(tokens.decided[row])
        longest = state.options.block_length or self.block_length
        return state.longest_draft_block(min(longest, room, self._share, 1 + self._most_drafts))

    def _draft_block(self, row: int, state: RequestState, tokens: StepTokens, length: int) -> Block:
        return state.draft_block(*tokens.seed(row), length, self.mask_token_id, self.vocab_size)

    def _diffusion(self, row: int, state: RequestState, tokens: StepTokens, drafts: list[list[int]]) -> Block | None:
        """Return a diffusion request's next block, or hand out what is left of the one that was cut short."""
        decided = int(tokens.decided[row])
        if state.pending:
            drafts[row] = self._hand_out_pending(row, state, tokens)
            return None
        if state.interrupted is not None:
            assert state.interrupted.prefix == decided - 2, "the resumption decides one token behind the block's seed"
            return state.interrupted
        return state.diffusion_block(
            *tokens.seed(row),
            self.max_model_len - decided,
            self.block_length,
            self.mask_token_id,
            self.vocab_size,
        )

    def _fill(
        self,
        blocks: dict[int, Block],
        states: dict[int, RequestState],
        tokens: StepTokens,
        given: int,
        others: bool,
    ) -> None:
        """Fill the blocks of rows, and carry on with those of parked requests as long as nobody waits.

        Args:
            blocks: by row.
            states: of all rows.
            tokens: of the step.
            given: tokens of the next causal pass without these blocks' drafts, all of which it decides.
            others: whether that pass has something to do even if no parked request's block becomes done.
        """
        mixed = len(self.parked) > 0
        started = time.perf_counter()
        self._run(list(blocks.values()), others)
        seconds = self._draft_seconds = time.perf_counter() - started
        for row, block in blocks.items():
            book = self.ledger.denoised if states[row].is_diffusion else self.ledger.drafted
            book(states[row].tally, block.passes)
            lookup = states[row].lookup
            if lookup is not None and block.passes and block.choice is None:
                splice(block, lookup, tokens.history(row))
        drafted = [block for block in blocks.values() if block.passes]
        if mixed:
            # The forward and the causal pass also serve blocks that auto mode did not plan for.
            self._cycle.void()
        elif drafted and all(block.passes == 1 for block in drafted):
            self._cycle.drafted(sum(block.length for block in drafted), seconds)
        self._trim(blocks, states, given, seconds)

    def _trim(self, blocks: dict[int, Block], states: dict[int, RequestState], given: int, seconds: float) -> None:
        """Leave those drafts in adaptive blocks that are worth verifying, after ``seconds`` of drafting."""
        adaptive = [row for row in blocks if states[row].is_adaptive]
        if not any(blocks[row].passes for row in adaptive):
            return  # looked-up drafts alone were chosen by what they are worth
        given += sum(blocks[row].length - 1 for row in blocks if row not in adaptive)
        # vLLM takes the first rank's drafts; how many another one keeps does not matter.
        keep = self._cycle.trim(
            [states[row].chances_of(blocks[row].confidence[1:]) for row in adaptive], given, seconds
        )
        for row, drafts in zip(adaptive, keep, strict=True):
            del blocks[row].tokens[1 + drafts :]

    def _run(self, blocks: list[Block], others: bool) -> None:
        """Run forwards until the blocks are filled, and over parked requests' blocks until a causal pass is due."""

        def leave(forwards: int) -> bool:
            return may_leave(forwards, blocks, self.parked, others, self.mask_token_id)

        self._draft_pass().run([*blocks, *self.parked.blocks], leave)

    def _draft_pass(self) -> DraftPass:
        assert self.draft_pass is not None, "vLLM calls load_model() before propose()"
        return self.draft_pass

    def _hand_out_parked(self) -> dict[str, list[int]]:
        """Return the tokens to commit of the parked requests whose block is done, and let those requests go on."""
        done: dict[str, list[int]] = {}
        for state, block in self.parked.take_done(self.mask_token_id):
            self.ledger.denoised(state.tally, block.passes)
            done[state.request_id] = self._commits(state, block)
        return done

    def _hand_out(self, row: int, state: RequestState, block: Block, tokens: StepTokens) -> list[int]:
        """Return a filled block's tokens behind its first, which is decided by now."""
        if not state.is_diffusion:
            state.drafted, state.confidence = block.passes > 0, block.confidence[1:]
            state.draft_probs = block.choice.probs if isinstance(block.choice, DraftChoice) else None
            drafts = block.decided(self.mask_token_id)[1:]
            return drafts if state.thinking is None else state.thinking.before_start(tokens.history(row), drafts)
        if state.interrupted is not None:
            # The resumption ran the seed again and sampled behind it, where the block has a token of its own.
            state.interrupted = None
            state.pending = block.decided(self.mask_token_id)[1:]
            return self._hand_out_pending(row, state, tokens)
        if not state.options.seed_first:
            tokens.replace_last(row, block.tokens[0], state)
        return self._commits(state, block)

    def _commits(self, state: RequestState, block: Block) -> list[int]:
        """Return the tokens that the causal pass is to commit behind a block's first."""
        drafts = block.decided(self.mask_token_id)[1:]
        if state.may_replace_sampled:
            state.pending = list(drafts)
        return drafts

    def _hand_out_pending(self, row: int, state: RequestState, tokens: StepTokens) -> list[int]:
        """Put a half-committed block's next token where the causal pass sampled one; return those behind it."""
        tokens.replace_last(row, state.pending.pop(0), state)
        return state.pending[: max(0, self.max_model_len - int(tokens.decided[row]) - 1)]
