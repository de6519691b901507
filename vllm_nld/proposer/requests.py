"""What the proposer knows of each request: its options, its limits, and what it has cost so far."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from vllm_nld.auto.acceptance import Acceptance, Prior
from vllm_nld.draft_pass.block import Block, CommitRule
from vllm_nld.draft_pass.prompt_lookup import Found, Lookup
from vllm_nld.draft_pass.token_choice import DraftChoice, SeededDraftChoice, TokenChoice
from vllm_nld.ops.noise import Noise, Sampler
from vllm_nld.options import NLDOptions
from vllm_nld.proposer.thinking import ThinkingBudget
from vllm_nld.serving.admission import EngineTraits, request_options
from vllm_nld.serving.ledger import Tally

FORGET_SHARE = 0.01
"""What a step without a draft takes off the evidence on a request's acceptance."""


@dataclass
class RequestState:
    """One request.

    Attributes:
        request_id: vLLM's internal id.
        cached: the model runner's own record of the request (token ids, sampling parameters).
        options: its options, the engine's defaults filled in.
        acceptance: what is known of its drafts' acceptance, for auto mode.
        sampler: vLLM's, for what is drawn.
        thinking: its thinking budget, if it has one.
        idle_steps: steps since it last drafted in auto mode.
        confidence: of the drafts that were handed out last.
        draft_probs: float32 ``[drafts, vocab]``, what those were drawn from; None if they were not drawn.
        drafted: whether the drafts that were handed out last took a draft forward; else they were looked up alone.
        lookup: what was said before; None if nothing is to be looked up.
        pending: tokens of a diffusion block that causal passes are still to commit, in order.
        interrupted: a diffusion block that was open when the request was preempted; it goes on when the request does.
        tally: what it has cost and yielded so far.
    """

    request_id: str
    cached: Any
    options: NLDOptions
    acceptance: Acceptance
    sampler: Sampler
    thinking: ThinkingBudget | None = None
    idle_steps: int = 0
    confidence: list[float] = field(default_factory=list)
    draft_probs: Tensor | None = None
    drafted: bool = True
    lookup: Lookup | None = None
    pending: list[int] = field(default_factory=list)
    interrupted: Block | None = None
    tally: Tally = field(default_factory=Tally)

    @property
    def params(self) -> Any:
        """vLLM's ``SamplingParams``."""
        return self.cached.sampling_params

    @property
    def task(self) -> Any:
        """The request's own LoRA (vLLM's ``LoRARequest``), or None."""
        return getattr(self.cached, "lora_request", None)

    @property
    def is_diffusion(self) -> bool:
        return self.options.mode == "diffusion"

    @property
    def may_replace_sampled(self) -> bool:
        """Whether a token that vLLM has just sampled may be replaced by a denoised one.

        Log-probabilities are computed for the sampled token, and a grammar has ruled on it.
        """
        return self.params.logprobs is None and self.params.structured_outputs is None

    @property
    def is_seeded(self) -> bool:
        """Whether the causal pass's random draws are promised to be the same in every batch."""
        return self.params.seed is not None and self.params.temperature > 0

    @property
    def is_adaptive(self) -> bool:
        """Whether the block length is chosen for every block, by measured time among other things."""
        return self.options.mode == "auto"

    @cached_property
    def noise(self) -> Noise:
        """The request's random numbers, where this extension draws."""
        # vLLM's internal request ids are random, and the same on every tensor-parallel rank.
        seed = zlib.crc32(self.request_id.encode()) if self.params.seed is None else self.params.seed
        return Noise(seed, self.sampler)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end the request."""
        eos = self.params.eos_token_id
        own = frozenset(self.params.stop_token_ids or ())
        return own if eos is None or self.params.ignore_eos else own | {eos}

    def is_over(self, sampled: list[int]) -> bool:
        """Whether the tokens just decided end the request, as far as token ids tell."""
        certain = sampled
        if self.is_diffusion and (self.pending or self.interrupted is not None or not self.options.seed_first):
            certain = sampled[:-1]  # the last one is yet to be replaced
        return not self.stop_ids.isdisjoint(certain)

    def is_prefill(self, scheduled: dict[str, int], drafted: dict[str, list[int]]) -> bool:
        """Whether the causal pass that has just run computed more than decoding needs: a prompt, or a resumption."""
        own = scheduled.get(self.request_id, 0) - len(drafted.get(self.request_id, ()))
        return own > 1 or self.cached.num_computed_tokens < self.cached.num_prompt_tokens

    def note_choice(self, drafts: bool, steps: int) -> None:
        """Take note of whether auto mode lets the request draft in the next step, or in none of the next ``steps``."""
        if drafts:
            self.idle_steps = 0
            return
        self.idle_steps += steps
        self.acceptance.forget(FORGET_SHARE * steps)

    def learn(self, drafts: int, accepted: int) -> None:
        """Take note of a verified block of self-speculation."""
        if self.drafted:
            self.acceptance.observe(drafts, accepted)
        self.acceptance.prior.calibration.observe(self.confidence[:drafts], accepted)

    def chances_of(self, confidence: list[float]) -> list[float]:
        """Return for each draft of these confidences how likely it is accepted, if those before it are."""
        return list(map(self.acceptance.prior.calibration.probability, confidence))

    def chances_of_found(self, found: Found) -> list[float]:
        """Return the same for looked-up drafts that are on offer; there are only two kinds in a run."""
        kinds = found.confidence()[:2]
        for kind in kinds:
            self.acceptance.prior.calibration.forget(kind)
        chances = self.chances_of(kinds)
        return chances[:1] + chances[1:] * (len(found.tokens) - 1)

    def remaining(self, longest: int) -> int:
        """Tokens the request may still generate, at most ``longest``."""
        if self.params.max_tokens is None:
            return longest
        return min(longest, int(self.params.max_tokens) - len(self.cached.output_token_ids))

    def longest_draft_block(self, longest: int) -> int:
        """Tokens of the longest block, seed included, that self-speculation may verify next.

        A cycle that verifies n drafts generates at most n + 1 tokens. It does not reach past ``min_tokens``: behind
        accepted drafts vLLM 0.32 forbids the stop tokens in the bonus position by the number of tokens before the
        cycle, where AR would allow them. Nor does it reach the token that the thinking budget forces: vLLM 0.32 forces
        it by the number of drafts, and would do so after a draft that ends the thinking by itself.
        """
        generated = len(self.cached.output_token_ids)
        longest = self.remaining(longest)
        if generated < self.params.min_tokens:
            longest = min(longest, self.params.min_tokens - generated)
        left = self._thinking_left()
        return longest if left is None else min(longest, max(1, left))

    def _thinking_left(self) -> int | None:
        if self.thinking is None:
            return None
        return self.thinking.left(self.cached.prompt_token_ids or [], self.cached.output_token_ids)

    def draft_block(self, seed: int, prefix: int, length: int, mask_token_id: int, vocab_size: int) -> Block:
        """Return a block of self-speculation to fill."""
        block = Block(prefix, [seed] + [mask_token_id] * (length - 1), CommitRule.for_drafts(self.options))
        block.adapted, block.task = self.options.draft_adapter, self.task
        if self.samples_drafts:
            block.choice = self._choice(prefix, vocab_size, SeededDraftChoice if self.is_seeded else DraftChoice)
        return block

    @property
    def samples_drafts(self) -> bool:
        """Whether drafts are drawn, and not the most probable tokens.

        A seeded request's may be anything (:class:`SeededDraftChoice`). Others' must be verified by the distribution
        that they were drawn from, and whether one is verified must not depend on what it is. So they are not drawn over
        several forwards, whose distributions depend on drafts that come later in the text. Nor under a grammar: the
        scheduler drops drafts that it forbids.
        """
        plain = self.options.draft_threshold == 0 and self.params.structured_outputs is None
        return (plain or self.is_seeded) and self.options.sampled_drafts and self.params.temperature > 0

    def diffusion_block(
        self, seed: int, prefix: int, room: int, longest: int, mask_token_id: int, vocab_size: int
    ) -> Block | None:
        """Return a block of diffusion to fill, or None if there is nothing to decide.

        Args:
            seed: the causal pass's token, which opens the block unless the request wants its blocks unseeded.
            prefix: tokens in the cache.
            room: positions up to the length limit.
            longest: the engine's longest block.
            mask_token_id: id of the mask token.
            vocab_size: tokens of the vocabulary.
        """
        # The seed is generated already, and the token that the commit yields may be dropped.
        length = min(self.options.block_length or longest, self.remaining(longest) + 1, room)
        if length < (2 if self.options.seed_first else 1):
            return None
        tokens = [seed if self.options.seed_first else mask_token_id] + [mask_token_id] * (length - 1)
        self._force_end_of_thinking(tokens)
        choice = self._choice(prefix, vocab_size)
        return Block(prefix, tokens, CommitRule.for_diffusion(self.options), choice, self.stop_ids, task=self.task)

    def _force_end_of_thinking(self, tokens: list[int]) -> None:
        """Write the end of thinking where the budget ends; the causal pass commits it like any other token."""
        if self.thinking is None:
            return
        seeded = self.options.seed_first
        output = self.cached.output_token_ids if seeded else self.cached.output_token_ids[:-1]
        left = self.thinking.left(self.cached.prompt_token_ids or [], output)
        if left is None:
            return
        start = left + int(seeded)
        for position, token in enumerate(self.thinking.end_tokens, start):
            if position < len(tokens):
                tokens[position] = token

    def _choice(self, prefix: int, vocab_size: int, kind: type[TokenChoice] = TokenChoice) -> TokenChoice | None:
        """Return how tokens are chosen, or None where it is simply the most probable one."""
        params, generated = self.params, len(self.cached.output_token_ids)
        temperature = params.temperature
        if self.is_diffusion and self.options.temperature is not None:
            temperature = self.options.temperature
        penalties = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
        seeded = int(self.options.seed_first or not self.is_diffusion)
        too_early = params.min_tokens - generated + seeded
        plain = penalties == (0.0, 0.0, 1.0) and params.allowed_token_ids is None and too_early <= 0
        if temperature == 0 and plain:
            return None
        history = self.cached.output_token_ids[: generated - 1 + seeded]
        return kind(
            vocab_size=vocab_size,
            noise=self.noise,
            prefix=prefix,
            temperature=temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            allowed=params.allowed_token_ids,
            barred=self.thinking.barred if self.thinking is not None and kind is DraftChoice else None,
            forbidden_until=(sorted(params.all_stop_token_ids), too_early),
            history=(list(self.cached.prompt_token_ids or []), list(history)),
            penalties=None if penalties == (0.0, 0.0, 1.0) else penalties,
        )


class Requests:
    """The states of all requests that the model runner knows.

    Args:
        runner: vLLM's model runner; read only.
        traits: what the engine offers.
        thinking: start and end token ids of the reasoning parser, if there is one.
    """

    def __init__(self, runner: Any, traits: EngineTraits, thinking: tuple[list[int], list[int]] | None) -> None:
        self._runner = runner
        self._traits = traits
        self._thinking = thinking
        self._states: dict[str, RequestState] = {}
        self._greedy, self._sampled, self._seeded = Prior(), Prior(), Prior()

    @property
    def rows(self) -> int:
        """Rows of the batch that hold a request."""
        return len(self._runner.input_batch.req_ids)

    def at(self, row: int) -> RequestState:
        """Return the state of the request in a batch row."""
        return self.state(self._runner.input_batch.req_ids[row])

    def state(self, request_id: str) -> RequestState:
        """Return a request's state; it is made when the request is first asked for."""
        state = self._states.get(request_id)
        cached = self._runner.requests[request_id]
        if state is None or state.cached is not cached:
            options = request_options(cached.sampling_params, self._traits)
            state = RequestState(
                request_id,
                cached,
                options,
                Acceptance(self._prior(cached.sampling_params)),
                self._runner.sampler.topk_topp_sampler,
                self._budget(cached.sampling_params),
                lookup=self._lookup(options, cached),
            )
            self._states[request_id] = state
        return state

    def _prior(self, params: Any) -> Prior:
        """Return what to expect of a request by the rule that accepts its drafts."""
        if params.temperature == 0:
            return self._greedy
        return self._sampled if params.seed is None else self._seeded

    def noise_at(self, row: int) -> tuple[Noise, int] | None:
        """Return a seeded row's random numbers, and the position of the first token that the step decides.

        None for rows whose causal draws are not seeded, and vLLM's warm-up's, which are no requests.
        """
        if row >= self.rows or not (state := self.at(row)).is_seeded:
            return None
        return state.noise, int(self._runner.input_batch.num_tokens_no_spec[row])

    def seed_draws(self, drafted: Mapping[str, Sequence[int]]) -> None:
        """Seed vLLM's generators for what the step draws last in each row: after its drafts, if it has any.

        Args:
            drafted: the drafts that it verifies, by request.
        """
        batch = self._runner.input_batch
        for row, generator in batch.generators.items():
            found = self.noise_at(row)
            if found is not None:
                noise, position = found
                generator.manual_seed(noise.key(position + len(drafted.get(batch.req_ids[row], ()))))

    def _lookup(self, options: NLDOptions, cached: Any) -> Lookup | None:
        if options.mode in ("ar", "diffusion") or options.prompt_lookup == 0 or cached.prompt_token_ids is None:
            return None
        return Lookup(options.prompt_lookup, self._runner.model_config.hf_config.mask_token_id)

    def _budget(self, params: Any) -> ThinkingBudget | None:
        limit = getattr(params, "thinking_token_budget", None)
        if limit is None or limit < 0 or self._thinking is None:
            return None
        return ThinkingBudget(limit, *self._thinking)

    def drop_drafts(self, request_id: str) -> None:
        """Forget what a request's drafts were drawn from: it was preempted, and they are never verified."""
        if request_id in self._states:
            self._states[request_id].draft_probs = None

    def finish(self, request_id: str) -> RequestState | None:
        """Forget a request and return its last state, if it was ever asked for."""
        state = self._states.pop(request_id, None)
        if state is not None:
            state.acceptance.prior.note_end(state.acceptance)
        return state
