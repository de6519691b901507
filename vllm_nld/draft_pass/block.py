"""A diffusion block while it is being filled, and the rule that fills it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vllm_nld.draft_pass.token_choice import TokenChoice
from vllm_nld.options import NLDOptions, Sampler


@dataclass(frozen=True)
class CommitRule:
    """Which masked positions a forward commits (:mod:`vllm_nld.draft_pass.selection`); every rule commits at least one.

    Attributes:
        sampler: the selection policy.
        threshold: samplers ``confidence_threshold`` and ``learned``; 0 commits everything at once.
        tokens_per_step: samplers ``top_k`` and ``left_to_right``; None spreads the block over ``max_steps``, or
            commits 1 if that is None, too.
        entropy_budget: sampler ``entropy_budget``, in nats.
        max_steps: forwards per block; the last one commits all that is left. None: no limit.
    """

    sampler: Sampler = "confidence_threshold"
    threshold: float = 0.0
    tokens_per_step: int | None = None
    entropy_budget: float = 0.0
    max_steps: int | None = None

    @classmethod
    def for_drafts(cls, options: NLDOptions) -> CommitRule:
        """Return self-speculation's rule."""
        return cls(threshold=options.draft_threshold)

    @classmethod
    def for_diffusion(cls, options: NLDOptions) -> CommitRule:
        """Return block diffusion's rule."""
        return cls(
            options.sampler,
            options.threshold,
            options.tokens_per_step,
            options.entropy_budget,
            options.max_denoising_steps,
        )

    def quota(self, masked: int, passes: int) -> int:
        """Return how many positions to commit in forward ``passes`` (from 0) with ``masked`` left, for fixed counts."""
        if self.tokens_per_step is not None:
            return self.tokens_per_step
        if self.max_steps is None:
            return 1
        return -(-masked // max(1, self.max_steps - passes))


@dataclass
class Block:
    """One request's block.

    Attributes:
        prefix: tokens in the cache; the block's first position.
        tokens: ids from the block's first position on, mask tokens where undecided; filled in place.
        rule: which positions a forward commits.
        choice: how a position's token is chosen; None takes the most probable one.
        stop_ids: a block is done as soon as one of these is decided with nothing undecided before it.
        passes: forwards that the block has taken.
        confidence: per position, the probability of the chosen token when it was committed; 1 where it was given.
        adapted: whether its forwards run with the draft adapter, if there is one.
        task: the request's own LoRA (vLLM's ``LoRARequest``), or None.
        pages: int32, the cache pages that hold the prefix, and perhaps more. The block's own copy, because its request
            may leave vLLM's batch while it is filled. None before the first forward and while the request is preempted.
    """

    prefix: int
    tokens: list[int]
    rule: CommitRule = CommitRule()
    choice: TokenChoice | None = None
    stop_ids: frozenset[int] = frozenset()
    passes: int = 0
    confidence: list[float] = field(default_factory=list)
    adapted: bool = False
    task: Any = None
    pages: Tensor | None = None

    def __post_init__(self) -> None:
        self.confidence = self.confidence or [1.0] * len(self.tokens)

    @property
    def length(self) -> int:
        """Tokens of the block, seed included."""
        return len(self.tokens)

    def is_done(self, mask_token_id: int) -> bool:
        """Whether no forward is needed any more."""
        for token in self.tokens:
            if token == mask_token_id:
                return False
            if token in self.stop_ids:
                return True
        return True

    def decided(self, mask_token_id: int) -> list[int]:
        """Return the tokens in front of the first undecided position; after a stop token nothing follows."""
        tokens: list[int] = []
        for token in self.tokens:
            if token == mask_token_id:
                break
            tokens.append(token)
            if token in self.stop_ids:
                break
        return tokens
