"""What the branches of a step read and leave, and how they are laid out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_nld.ops import BIDIRECTIONAL
from vllm_nld.ops.sizes import power_of_two
from vllm_nld.speculator.table import Numbers


@dataclass(frozen=True)
class Laid:
    """The branches of a step.

    Attributes:
        slot_of_row: int ``[rows]``, on the host; -1 where a row does not branch.
        slots: how many; the last ones may be no row's.
        count: branches of a slot.
        length: tokens of a branch.
        hidden: ``[tokens, hidden]`` of the branches, once the step has run.
    """

    slot_of_row: Numbers
    slots: int
    count: int
    length: int
    hidden: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens of all branches."""
        return self.slots * self.count * self.length


@dataclass(frozen=True)
class Hits:
    """The branches that verification ended at, and the places of the drafts from them; in slots of their own.

    Attributes:
        slot_of_row: int32 ``[rows]``; -1 where a row does not draft by branches.
        laid: the step's branches.
        most: branches of a request, at most.
        count: slots.
        steps: drafts of the longest block.
        sources: int64 ``[drafts]``, where among the branches' tokens each draft was predicted.
        draw_requests: int64 ``[drafts]``, whose each is.
        draw_positions: int64 ``[drafts]``, whose noise each is drawn by.
        block_lens: int32 ``[slots]``, tokens of the next block; 1: no branch was hit.
    """

    slot_of_row: Tensor
    laid: Laid
    most: int
    count: int
    steps: int
    sources: Tensor
    draw_requests: Tensor
    draw_positions: Tensor
    block_lens: Tensor

    @property
    def columns(self) -> Tensor:
        """int64 ``[drafts]``, each draft's place in its block; what looks past the longest block counts as its last."""
        columns = torch.arange(self.laid.length - 1, device=self.sources.device).clamp(max=self.steps - 1)
        return columns.repeat(self.count)


class BranchBuffers:
    """What a step's branches read, and in a CUDA graph what they leave.

    Args:
        tokens: of all branches, at most.
        pages: width of vLLM's block table.
        dtype: of the model.
        device: of the model.
    """

    def __init__(self, tokens: int, pages: int, dtype: torch.dtype, device: torch.device) -> None:
        branches = max(1, tokens // 2)  # the shortest have two tokens
        self.ids = torch.zeros(tokens, dtype=torch.int32, device=device)
        self.positions = torch.zeros(tokens, dtype=torch.int64, device=device)
        self._factors = torch.zeros(2 * tokens, 1, dtype=dtype, device=device)
        self.adapted = self._factors[tokens:]
        self.hidden: Tensor | None = None
        self.prefix_lens = torch.zeros(branches, dtype=torch.int32, device=device)
        self.live = torch.zeros(branches, dtype=torch.int32, device=device)
        self.kinds = torch.full((branches,), BIDIRECTIONAL, dtype=torch.int32, device=device)
        self._starts = torch.arange(branches + 1, dtype=torch.int32, device=device)
        self._starts_by_length: dict[int, Tensor] = {}
        self._pages = {graph: torch.zeros(0, pages, dtype=torch.int32, device=device) for graph in (False, True)}

    def factors(self, tokens: int, added: int) -> Tensor:
        """Return what the adapter is multiplied by: 0 for ``tokens`` that verify, then what branches want."""
        first = len(self.adapted)
        return self._factors[first - tokens : first + added]

    def pages(self, branches: int, graph: bool) -> Tensor:
        """Return room for the pages of so many branches, int32 ``[branches, pages]``.

        Graphs have their own, which never moves: the largest is captured first.
        """
        known = self._pages[graph]
        if len(known) < branches:
            self._pages[graph] = known = known.new_zeros(power_of_two(branches), known.shape[1])
        return known[:branches]

    def starts(self, length: int) -> Tensor:
        """Return where branches of ``length`` tokens start."""
        if length not in self._starts_by_length:
            self._starts_by_length[length] = self._starts * length
        return self._starts_by_length[length]
