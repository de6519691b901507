"""Acceptance length on held-out text, as in self-speculation, but with many cycles in one forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_nld.reference import DraftAdapter, ReferenceModel
from vllm_nld.training.objective import Drafts, Target
from vllm_nld.training.text import Rows


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
    rows: Rows,
    block_length: int,
    eos: frozenset[int] = frozenset(),
    blocks: int = 16,
    progress: Callable[[int], None] = lambda _: None,
    batch: int = 1,
) -> Acceptance:
    """Draft from every position after the prefix, then follow the cycles that self-speculation would have run.

    Verify does not change the text. So the greedy text can be given in advance, and cycles are independent.

    Args:
        rows: any text and the model's own greedy continuations.
        blocks: drafted blocks per forward and row.
        progress: called with the number of rows that were measured.
        batch: rows per forward.
    """
    cycles = []
    for part in rows.split(batch):
        last = part.ids.shape[1] - block_length
        target = Target.of(model, part.ids, part.begins[:, None], eos)
        unended = (~target.ended).sum(1) - part.begins
        room = max(1, int(torch.minimum(last + 1 - part.begins, unended).max()))
        starts = (part.begins[:, None] + torch.arange(room, device=part.ids.device)).clamp(max=last)
        pieces = torch.split(starts, blocks, dim=1)
        drafts = [Drafts.over(model, adapter, target, piece, block_length).emitted() for piece in pieces]
        emitted, ended = torch.cat(drafts, dim=1).tolist(), target.ended.tolist()
        for row, begin in enumerate(part.begins.tolist()):
            cycles.append(walk(emitted[row][: last + 1 - begin], ended[row][begin:]))
        progress(len(part))
    return Acceptance(cycles, block_length)


def walk(emitted: list[int], ended: list[bool]) -> list[int]:
    """Return the tokens of each cycle, given the yield of a cycle from each position and where the text has ended."""
    cycles, place = [], 0
    while place < len(emitted) and not ended[place]:
        cycles.append(emitted[place])
        place += emitted[place]
    return cycles
