"""How a denoising forward chooses the token of a position, where it is not simply the most probable one.

Confidence is not decided here: it stays the probability of the chosen token in the raw, untempered distribution.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

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
        seed: of this block's random draws; the same seed gives the same block, whatever the batch.
        vocab_size: tokens of a draw.
        length: positions of a draw: the block's.
        allowed: token ids that may be chosen; None: all.
        forbidden_until: ``(tokens, position)``: the stop tokens may not be chosen before this position of the block.
        history: prompt and output token ids before the block, for penalties.
        penalties: ``(presence, frequency, repetition)``; None: none.
    """

    vocab_size: int
    length: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    allowed: list[int] | None = None
    forbidden_until: tuple[list[int], int] = ((), 0)  # type: ignore[assignment]
    history: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))
    penalties: tuple[float, float, float] | None = None
    _generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.temperature > 0:
            self.temperature = max(self.temperature, COLDEST)
        if self.penalties is not None:
            presence, frequency, repetition = self.penalties
            self.penalties = presence, frequency, min(max(repetition, 1 / STRONGEST), STRONGEST)

    def choose(self, logits: Tensor, positions: list[int], committed: list[int]) -> Tensor:
        """Return token ids, int64 ``[positions]``.

        Args:
            logits: raw, float32 ``[positions, vocab]``, of the masked positions.
            positions: their places in the block.
            committed: the block's tokens decided so far, for penalties.
        """
        if self.temperature == 0:
            return self._constrain(logits.clone(), positions, committed).argmax(-1)
        # Gumbel-max in its exponential form (as vLLM's random_sample): argmax of p / e is a sample of p.
        return (self.distribution(logits, positions, committed) / self._draw(logits.device)[positions]).argmax(-1)

    def distribution(self, logits: Tensor, positions: list[int], committed: list[int]) -> Tensor:
        """Return what a token is drawn from at a temperature above 0, float32 ``[positions, vocab]``."""
        logits = self._constrain(logits.clone(), positions, committed)
        return self._filter(logits.div_(self.temperature)).softmax(-1)

    def _constrain(self, logits: Tensor, positions: list[int], committed: list[int]) -> Tensor:
        if self.penalties is not None:
            logits = self._penalize(logits, committed)
        if self.allowed is not None:
            ruled_out = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
            ruled_out[self.allowed] = False
            logits[:, ruled_out] = -torch.inf
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

    def _draw(self, device: torch.device) -> Tensor:
        """Exponential noise ``[length, vocab]`` of one forward; drawn for the whole block, so that it depends on
        nothing but the seed and the number of forwards before.
        """
        noise = torch.empty(self.length, self.vocab_size, device=device)
        return noise.exponential_(generator=self._random(device))

    def _random(self, device: torch.device) -> torch.Generator:
        if self._generator is None:
            self._generator = torch.Generator(device).manual_seed(self.seed)
        return self._generator


@dataclass
class DraftChoice(TokenChoice):
    """Draws the drafts of one block of self-speculation, in its one forward, and keeps what they were drawn from.

    Speculative sampling (Leviathan et al. 2023, appendix A.1; vLLM's ``rejection_sampler.py``) is exact if a draft is
    drawn from the distribution that the sampler is told, given the drafts before it. Here every position's
    distribution follows from prefix and seed alone, and the draws are independent. Nothing that depends on a draw may
    decide how many drafts are verified, so their confidence is the distribution's peak, not the drawn token's share.

    Attributes:
        probs: float32 ``[positions, vocab]``, once drawn.
    """

    probs: Tensor | None = None

    def choose(self, logits: Tensor, positions: list[int], committed: list[int]) -> Tensor:
        """Return draws, int64 ``[positions]``, by inverting the distribution function: one random number each."""
        self.probs = self.distribution(logits, positions, committed)
        nothing = self.probs[:, 0].isnan()
        if nothing.any():  # the constraints leave no token; what is drawn may be anything, as long as it is told
            self.probs[nothing] = logits[nothing].softmax(-1)
        # Summed in float64: in float32 the tail of 131072 tokens would be drawn too rarely or too often.
        sums = self.probs.cumsum(-1, dtype=torch.float64)
        draws = torch.rand(
            self.length, dtype=torch.float64, device=logits.device, generator=self._random(logits.device)
        )
        return torch.searchsorted(sums, draws[positions, None] * sums[:, -1:], right=True).squeeze(1)

    @property
    def peak(self) -> Tensor:
        """The largest probability of every position, float32 ``[positions]``."""
        assert self.probs is not None, "drafts are drawn first"
        return self.probs.amax(-1)
