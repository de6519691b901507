"""A diffusion block while it is being filled, and the rule that fills it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vllm_nld.draft_pass.token_choice import TokenChoice
from vllm_nld.options import NLDOptions
from vllm_nld.policies import POLICIES


@dataclass(frozen=True)
class CommitRule:
    """Which masked positions a forward commits; every rule commits at least one.

    Attributes:
        policy: the selection policy's name in :data:`vllm_nld.policies.POLICIES`.
        values: of the policy's options.
        max_steps: forwards per block; the last one commits all that is left. None: no limit.
    """

    policy: str
    values: Mapping[str, Any]
    max_steps: int | None = None

    @classmethod
    def for_drafts(cls, options: NLDOptions) -> CommitRule:
        """Return self-speculation's rule."""
        return cls("confidence_threshold", {"threshold": options.draft_threshold})

    @classmethod
    def for_diffusion(cls, options: NLDOptions) -> CommitRule:
        """Return block diffusion's rule."""
        own = POLICIES[options.sampler].options
        values = {option.name: getattr(options, option.name) for option in own}
        return cls(options.sampler, values, options.max_denoising_steps)


AT_ONCE = CommitRule("confidence_threshold", {"threshold": 0.0})
"""Commits everything in one forward."""


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
        beyond: positions at its end that are drafted for what they tell of the block's continuation, and not verified.
        ranked: how many candidates of each position to keep.
        candidates: by position, the most probable tokens and their probabilities; empty where none are kept.
        pages: int32, the cache pages that hold the prefix, and perhaps more. The block's own copy, because its request
            may leave vLLM's batch while it is filled. None before the first forward and while the request is preempted.
    """

    prefix: int
    tokens: list[int]
    rule: CommitRule = AT_ONCE
    choice: TokenChoice | None = None
    stop_ids: frozenset[int] = frozenset()
    passes: int = 0
    confidence: list[float] = field(default_factory=list)
    adapted: bool = False
    task: Any = None
    beyond: int = 0
    ranked: int = 0
    candidates: dict[int, tuple[list[int], list[float]]] = field(default_factory=dict)
    pages: Tensor | None = None

    def __post_init__(self) -> None:
        self.confidence = self.confidence or [1.0] * len(self.tokens)

    @property
    def length(self) -> int:
        """Tokens of the block, seed included."""
        return len(self.tokens)

    def look_past(self, mask_token_id: int) -> None:
        """Also predict the position after the block."""
        self.tokens.append(mask_token_id)
        self.confidence.append(1.0)
        self.beyond = 1

    def shorten(self, length: int, rows: int) -> None:
        """Keep at most ``length`` tokens, and one beyond them if there is one and ``rows`` says that it is drafted."""
        kept = min(self.length - self.beyond, length)
        rows = min(self.length, rows, kept + self.beyond)
        del self.tokens[rows:], self.confidence[rows:]
        self.beyond = rows - kept

    def is_done(self, mask_token_id: int) -> bool:
        """Whether no forward is needed any more."""
        for token in self.tokens[: self.length - self.beyond]:
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
