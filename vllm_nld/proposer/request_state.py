"""What the proposer knows of one request: its options, its limits, and what it has cost so far."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from vllm_nld.draft_sources.acceptance import Prior
from vllm_nld.draft_sources.base import DraftSource
from vllm_nld.draft_sources.calibration import ChanceClass
from vllm_nld.ops.noise import Noise, Sampler
from vllm_nld.options import NLDOptions
from vllm_nld.origins import put
from vllm_nld.proposer.diffusion import DiffusionRequest
from vllm_nld.proposer.pending import Pending
from vllm_nld.proposer.thinking import ThinkingBudget
from vllm_nld.serving.ledger import Tally


@dataclass
class RequestState:
    """One request.

    Attributes:
        request_id: vLLM's internal id.
        cached: the model runner's own record of the request (token ids, sampling parameters).
        options: its options, the engine's defaults filled in.
        prior: what is usual on this server for requests whose drafts are accepted by the same rule.
        sampler: vLLM's, for what is drawn.
        thinking: its thinking budget, if it has one.
        sources: where its drafts come from; none in other modes.
        handed_out: of the drafts handed out last, the source that the block came from and the drafts' classes.
        draft_probs: float32 ``[drafts, vocab]``, what those were drawn from; None if they were not drawn.
        pending: the branches of its next verification, if there are any.
        tally: what it has cost and yielded so far.
        origins: how each of its tokens came (:mod:`vllm_nld.origins`), if it wants to know.
    """

    request_id: str
    cached: Any
    options: NLDOptions
    prior: Prior
    sampler: Sampler
    thinking: ThinkingBudget | None = None
    sources: tuple[DraftSource, ...] = ()
    handed_out: tuple[DraftSource, list[ChanceClass]] | None = None
    draft_probs: Tensor | None = None
    pending: Pending | None = None
    tally: Tally = field(default_factory=Tally)
    origins: str = ""

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
        """Whether the block length is chosen for every block, by measured time and other things."""
        return self.options.mode == "auto"

    @property
    def was_drafted_by_auto(self) -> bool:
        """Whether auto mode had a forward run for the drafts that were handed out last."""
        return self.is_adaptive and self.handed_out is not None and self.handed_out[0].takes_forward

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
        if self.is_diffusion and (not self.options.seed_first or self.diffusion.replaces_sampled):
            certain = sampled[:-1]  # the last one is going to be replaced
        return not self.stop_ids.isdisjoint(certain)

    @cached_property
    def diffusion(self) -> DiffusionRequest:
        """The request's phase; for requests in mode diffusion."""
        return DiffusionRequest(self.may_replace_sampled)

    @cached_property
    def by_forward(self) -> DraftSource:
        """The source whose drafts a draft forward makes."""
        return next(source for source in self.sources if source.takes_forward)

    @cached_property
    def at_hand(self) -> tuple[DraftSource, ...]:
        """The sources whose drafts take no forward."""
        return tuple(source for source in self.sources if not source.takes_forward)

    def note_origins(self, more: str) -> None:
        """Record how the tokens came that have just been decided."""
        self.origins = put(self.origins, len(self.cached.output_token_ids) - len(more), more)

    def origins_of_drafts(self, accepted: int) -> str:
        """Return how the first ``accepted`` of the drafts came that were handed out last."""
        classes = self.handed_out[1] if self.handed_out is not None else []
        return "".join(chance.origin for chance in classes[:accepted])

    def learn(self, drafts: int, accepted: int) -> None:
        """Learn from a causal pass that verified ``drafts`` of the drafts that were handed out last."""
        if self.handed_out is not None:
            source, classes = self.handed_out
            source.learn(drafts, accepted)
            self.prior.calibration.observe(classes[:drafts], accepted)

    def close(self) -> None:
        """Called when the request is over."""
        for source in self.sources:
            source.close()

    def remaining(self, longest: int) -> int:
        """Tokens the request may still generate, at most ``longest``."""
        if self.params.max_tokens is None:
            return longest
        return min(longest, int(self.params.max_tokens) - len(self.cached.output_token_ids))

    def longest_draft_block(self, longest: int) -> int:
        """Tokens of the longest block, seed included, that self-speculation may verify next.

        A cycle that verifies n drafts generates at most n + 1 tokens. It does not reach past ``min_tokens``: after
        accepted drafts vLLM 0.32 forbids the stop tokens in the bonus position by the number of tokens before the
        cycle, where AR would allow them. Nor does it reach the token that the thinking budget forces, which drafts do
        not foresee.
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
