"""Random numbers that belong to a position of a text, and not to the step that decides it.

vLLM gives a seeded request one generator, which moves on with every draw. How many draws there were before a position
depends on the schedule: on preemptions, on drafts that were cut, on block lengths. Here every draw has a generator of
its own, seeded by the request's seed and the position. All draws are made by vLLM's own sampler, so drafts and
verification see the same noise as an AR step: the draft ``argmax(q / e)`` is mostly the token ``argmax(p / e)``
that the causal pass draws from its own distribution, and if it is, it is accepted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Sampler = Callable[
    [Tensor, dict[int, torch.Generator], Tensor | None, Tensor | None],
    tuple[Tensor, Tensor | None],
]
"""vLLM's ``TopKTopPSampler``: takes logits, generators by row, top-k, top-p; returns tokens, and perhaps what it drew
from."""


@dataclass(frozen=True)
class Noise:
    """A request's random numbers.

    Attributes:
        seed: any integer; different seeds give unrelated numbers.
        sampler: draws from logits.
    """

    seed: int
    sampler: Sampler

    def key(self, position: int, forward: int = 0) -> int:
        """Return the seed of one draw, 0 to 2^64 - 1.

        Args:
            position: of the token, from the start of the prompt.
            forward: 0 for the causal pass and for drafts, which should agree with it; from 1 on for denoising forwards.
        """
        name = f"{self.seed}/{position}/{forward}".encode()
        return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")

    def generator(self, position: int, device: torch.device, forward: int = 0) -> torch.Generator:
        """Return the generator of one draw; arguments as for :meth:`key`."""
        return torch.Generator(device).manual_seed(self.key(position, forward))

    def draw(self, logits: Tensor, positions: Sequence[int], forward: int = 0) -> Tensor:
        """Return a token per position, int64 ``[positions]``.

        Args:
            logits: float32 ``[positions, vocab]``, after temperature, top-k and top-p; may be overwritten.
            positions: of the tokens, from the start of the prompt.
            forward: as for :meth:`key`.
        """
        generators = {row: self.generator(place, logits.device, forward) for row, place in enumerate(positions)}
        tokens, _ = self.sampler(logits, generators, None, None)
        return tokens.long()
