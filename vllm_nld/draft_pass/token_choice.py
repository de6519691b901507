"""How a denoising forward chooses the token of a position, where it is not simply the most probable one.

Confidence is not decided here: it stays the probability of the chosen token in the raw, untempered distribution.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_nld.ops.noise import Noise

COLDEST = 1e-2
"""Lowest temperature but 0: vLLM's own. Below, logits divided by it may overflow."""
STRONGEST = 1e6
"""A repetition penalty may divide or multiply by no more, so that logits stay finite."""


@dataclass
class TokenChoice:
    """A request's sampling parameters, as far as they bear on denoising.

    Attributes:
        temperature: 0 takes the best token that the constraints leave.
        top_k: 0 or less: no limit.
        top_p: 1: no limit.
        noise: the request's random numbers; None where nothing is drawn.
        prefix: the block's first position.
        vocab_size: tokens of a draw.
        allowed: token ids that may be chosen; None: all.
        barred: a token that a draft must not be (:meth:`vllm_nld.proposer.thinking.ThinkingBudget.barred`), or None.
        forbidden_until: ``(tokens, position)``: the stop tokens may not be chosen before this position of the block.
        history: prompt and output token ids before the block, for penalties.
        penalties: ``(presence, frequency, repetition)``; None: none.
    """

    vocab_size: int
    noise: Noise | None = None
    prefix: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    allowed: list[int] | None = None
    barred: int | None = None
    forbidden_until: tuple[list[int], int] = ((), 0)  # type: ignore[assignment]
    history: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))
    penalties: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        if self.temperature > 0:
            self.temperature = max(self.temperature, COLDEST)
        if self.penalties is not None:
            presence, frequency, repetition = self.penalties
            self.penalties = presence, frequency, min(max(repetition, 1 / STRONGEST), STRONGEST)

    def choose(self, logits: Tensor, positions: list[int], committed: list[int], forward: int = 1) -> Tensor:
        """Return token ids, int64 ``[positions]``.

        Args:
            logits: raw, float32 ``[positions, vocab]``, of the masked positions.
            positions: their places in the block.
            committed: the block's tokens decided so far, for penalties.
            forward: number of this forward in the block, from 1.
        """
        if self.temperature == 0:
            return self._constrain(logits.clone(), positions, committed).argmax(-1)
        return self._draw(self._sampled_logits(logits, positions, committed), positions, forward)

    def _draw(self, logits: Tensor, positions: list[int], forward: int) -> Tensor:
        assert self.noise is not None, "a request with a temperature has noise"
        return self.noise.draw(logits, [self.prefix + position for position in positions], forward)

    def _sampled_logits(self, logits: Tensor, positions: list[int], committed: list[int]) -> Tensor:
        """Return logits of what a token is drawn from at a temperature above 0, float32 ``[positions, vocab]``."""
        logits = self._constrain(logits.clone(), positions, committed)
        return self._filter(logits.div_(self.temperature))

    def _constrain(self, logits: Tensor, positions: list[int], committed: list[int]) -> Tensor:
        if self.penalties is not None:
            logits = self._penalize(logits, committed)
        if self.allowed is not None:
            ruled_out = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
            ruled_out[self.allowed] = False
            logits[:, ruled_out] = -torch.inf
        if self.barred is not None:
            logits[:, self.barred] = -torch.inf
        tokens, until = self.forbidden_until
        early = [index for index, position in enumerate(positions) if position < until]
        if early and tokens:
            logits[torch.tensor(early)[:, None], torch.tensor(list(tokens))[None]] = -torch.inf
        return logits

    def _penalize(self, logits: Tensor, committed: list[int]) -> Tensor:
        """Apply vLLM's penalties; tokens that are committed by one and the same forward do not see each other."""
        assert self.penalties is not None
        presence, frequency, repetition = self.penalties
        prompt, output = self.history
        counts = torch.bincount(torch.tensor([*output, *committed], dtype=torch.int64), minlength=self.vocab_size).to(
            logits.device
        )[: logits.shape[-1]]
        seen = counts > 0
        in_prompt = torch.zeros_like(seen)
        in_prompt[torch.tensor(sorted(set(prompt)), dtype=torch.int64)] = True
        repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(seen | in_prompt, repeated, logits)
        return logits - frequency * counts - presence * seen

    def _filter(self, logits: Tensor) -> Tensor:
        from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

        rows = logits.shape[0]
        top_k = torch.full((rows,), min(self.top_k, logits.shape[-1])) if self.top_k > 0 else None
        top_p = torch.full((rows,), self.top_p) if self.top_p < 1 else None
        if top_k is None and top_p is None:
            return logits
        filtered: Tensor = apply_top_k_top_p(
            logits,
            None if top_k is None else top_k.to(logits.device),
            None if top_p is None else top_p.to(logits.device),
        )
        return filtered


@dataclass
class DraftChoice(TokenChoice):
    """Draws the drafts of one block of self-speculation, in its one forward, and keeps what they were drawn from.

    Speculative sampling (Leviathan et al. 2023, appendix A.1; vLLM's ``rejection_sampler.py``) is exact if a draft is
    drawn from the distribution that the sampler is told, given the drafts before it. Here every position's
    distribution follows from prefix and seed only, and the draws are independent. Nothing that depends on a draw may
    decide how many drafts are verified, so their confidence is the distribution's peak, not the drawn token's share.

    Attributes:
        probs: float32 ``[positions, vocab]``, once drawn.
    """

    probs: Tensor | None = None

    def choose(self, logits: Tensor, positions: list[int], committed: list[int], forward: int = 1) -> Tensor:
        """Return draws, int64 ``[positions]``, by inverting the distribution function: one random number each."""
        assert self.noise is not None, "a request with a temperature has noise"
        self.probs = self._sampled_logits(logits, positions, committed).softmax(-1)
        nothing = self.probs[:, 0].isnan()
        if nothing.any():  # the constraints leave no token; what is drawn may be any but a barred one, if it is told
            unconstrained = logits[nothing]
            if self.barred is not None:
                unconstrained[:, self.barred] = -torch.inf
            self.probs[nothing] = unconstrained.softmax(-1)
        # Summed in float64: in float32 the tail of 131072 tokens would be drawn too rarely or too often.
        sums = self.probs.cumsum(-1, dtype=torch.float64)
        generator = self.noise.generator(self.prefix, logits.device, forward)
        # Also numbers for positions before the first, so that a position's does not depend on which are asked for.
        draws = torch.rand(max(positions) + 1, dtype=torch.float64, device=logits.device, generator=generator)
        return torch.searchsorted(sums, draws[positions, None] * sums[:, -1:], right=True).squeeze(1)

    @property
    def peak(self) -> Tensor:
        """The largest probability of every position, float32 ``[positions]``."""
        assert self.probs is not None, "drafts are drawn first"
        return self.probs.amax(-1)


@dataclass
class SeededDraftChoice(TokenChoice):
    """Draws the drafts of a seeded request, by the noise with which the causal pass is going to draw those positions.

    The causal pass draws its token whatever the draft is, and a draft is accepted if it is that token. So drafts cannot
    change the text, and need not be told of; sharing the noise makes them likely to be right.
    """

    def _draw(self, logits: Tensor, positions: list[int], forward: int) -> Tensor:
        return super()._draw(logits, positions, 0)
