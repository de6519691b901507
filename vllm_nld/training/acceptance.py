"""Acceptance length on held-out text, as in self-speculation, but with many cycles in one forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_nld.reference import DraftAdapter, ReferenceModel
from vllm_nld.training.objective import Drafts, Target


@dataclass(frozen=True)
class Acceptance:
    """Cycles of self-speculation over held-out text.

    Attributes:
        cycles: per row of text, the tokens that each cycle yields.
        block_length: tokens of a drafted block, with the given first one.
    """

    cycles: list[list[int]]
    block_length: int

    @property
    def length(self) -> float:
        """Acceptance length: tokens per cycle, 1 + accepted drafts."""
        emitted = [count for row in self.cycles for count in row]
        return sum(emitted) / max(len(emitted), 1)

    @property
    def by_position(self) -> list[float]:
        """Share of the cycles that accept the draft at position 1, 2, ... of the block."""
        emitted = [count for row in self.cycles for count in row]
        places = range(1, self.block_length)
        return [sum(count > place for count in emitted) / max(len(emitted), 1) for place in places]


@torch.no_grad()
def measure(
    model: ReferenceModel,
    adapter: DraftAdapter | None,
    rows: Tensor,
    prefix: int,
    block_length: int,
    eos: frozenset[int] = frozenset(),
    blocks: int = 16,
    progress: Callable[[], None] = lambda: None,
) -> Acceptance:
    """Draft from every position after the prefix, then follow the cycles that self-speculation would have run.

    Verify does not change the text. So the greedy text can be given in advance, and cycles are independent.

    Args:
        rows: int64 ``[rows, length]``, ``prefix`` tokens of any text and the model's own greedy continuation.
        blocks: drafted blocks per forward and row.
        progress: called after each row.
    """
    starts = torch.arange(prefix, rows.shape[1] - block_length + 1, device=rows.device)
    cycles = []
    for row in rows:
        target = Target.of(model, row[None], prefix, eos)
        parts = [Drafts.over(model, adapter, target, part[None], block_length) for part in torch.split(starts, blocks)]
        emitted = torch.cat([part.emitted()[0] for part in parts]).tolist()
        cycles.append(walk(emitted, target.ended[0, prefix:].tolist()))
        progress()
    return Acceptance(cycles, block_length)


def walk(emitted: list[int], ended: list[bool]) -> list[int]:
    """Return the tokens of each cycle, given the yield of a cycle from each position and where the text has ended."""
    cycles, place = [], 0
    while place < len(emitted) and not ended[place]:
        cycles.append(emitted[place])
        place += emitted[place]
    return cycles
