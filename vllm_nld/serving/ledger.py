"""Counts the cost and yield of requests: forwards by kind, tokens by mode, blocks, accepted drafts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

DECODE_KINDS = {"ar": ("ar",), "self_speculation": ("draft", "verify"), "diffusion": ("denoise", "commit")}
"""Kinds of forwards that count for a mode's tokens. The prefill is free, as in AR's and diffusion's published TPF."""


COUNTS = ("forwards", "tokens", "blocks", "accepted", "branches")


@dataclass
class Tally:
    """Counts of one request, or of all of them.

    In the total, a forward that serves n requests counts n times.

    Attributes:
        forwards: by kind: prefill, ar, draft, verify, denoise, commit.
        tokens: generated tokens by mode.
        blocks: blocks by mode: verified blocks of self-speculation, denoised blocks of diffusion.
        accepted: accepted drafts by mode.
        branches: those ``run``, ``tokens`` that they took, and hits, ``guess`` and ``mask``: each saved a draft.
    """

    forwards: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    blocks: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    branches: Counter[str] = field(default_factory=Counter)

    def tokens_per_forward(self, mode: str) -> float | None:
        """Return tokens per decode forward of a mode, or None before its first."""
        forwards = sum(self.forwards[kind] for kind in DECODE_KINDS[mode])
        return self.tokens[mode] / forwards if forwards else None

    def acceptance_length(self) -> float | None:
        """Return 1 + accepted / verified blocks of self-speculation, as vLLM defines it, or None before the first."""
        blocks = self.blocks["self_speculation"]
        return 1 + self.accepted["self_speculation"] / blocks if blocks else None

    def passes_per_block(self) -> float | None:
        """Return denoising forwards per diffusion block, or None before the first."""
        blocks = self.blocks["diffusion"]
        return self.forwards["denoise"] / blocks if blocks else None

    def as_dict(self) -> dict[str, dict[str, int]]:
        """Return the counts as plain dicts."""
        return {name: dict(getattr(self, name)) for name in COUNTS}

    @classmethod
    def between(cls, before: dict[str, dict[str, int]], after: dict[str, dict[str, int]]) -> Tally:
        """Return what was added between two results of :meth:`as_dict`."""
        return cls(*(Counter(after[name]) - Counter(before[name]) for name in COUNTS))

    def add(self, other: Tally) -> None:
        """Add the counts of another."""
        for name in COUNTS:
            getattr(self, name).update(getattr(other, name))

    def summary(self) -> str:
        """One line for the log."""
        parts = [f"{mode} {count} tokens" for mode, count in sorted(self.tokens.items()) if count]
        for mode in sorted(self.tokens):
            rate = self.tokens_per_forward(mode)
            if rate is not None:
                parts.append(f"TPF {rate:.2f} ({mode})")
        length, passes = self.acceptance_length(), self.passes_per_block()
        parts += [f"acceptance length {length:.2f}"] if length is not None else []
        parts += [f"{passes:.2f} denoising passes per block"] if passes is not None else []
        if self.branches:
            parts.append("branches " + ", ".join(f"{kind} {count}" for kind, count in sorted(self.branches.items())))
        parts.append("forwards " + ", ".join(f"{kind} {count}" for kind, count in sorted(self.forwards.items())))
        return "; ".join(parts)


class Plan(NamedTuple):
    """What the second runner's scheduler tells its workers with a step.

    Attributes:
        tally: counts so far.
        decisions: of auto mode so far, by what was done and the tokens of a block.
        auto_drafts: whether requests in auto mode draft after the step.
        requests: that ran when that was decided.
    """

    tally: Tally
    decisions: Counter[tuple[str, int]]
    auto_drafts: bool
    requests: int


class Ledger:
    """Counts every step for the request and for the total."""

    def __init__(self) -> None:
        self.total = Tally()

    def causal(self, tally: Tally, kind: str, mode: str, tokens: int, accepted: int) -> None:
        """Count a request's share of a causal pass.

        A block of self-speculation counts here, when it is verified, because its request may end or be preempted
        before.
        """
        for book in (tally, self.total):
            book.forwards[kind] += 1
            book.tokens[mode] += tokens
            if kind == "verify":
                book.blocks[mode] += 1
            if accepted:
                book.accepted[mode] += accepted

    def drafted(self, tally: Tally, passes: int) -> None:
        """Count the forwards that drafted a block of self-speculation."""
        for book in (tally, self.total):
            book.forwards["draft"] += passes

    def branched(self, tally: Tally, kind: str, count: int = 1) -> None:
        """Count what a request's branches did."""
        for book in (tally, self.total):
            book.branches[kind] += count

    def denoised(self, tally: Tally, passes: int) -> None:
        """Count a diffusion block that was denoised in ``passes`` forwards."""
        for book in (tally, self.total):
            book.forwards["denoise"] += passes
            book.blocks["diffusion"] += 1
