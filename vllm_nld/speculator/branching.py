"""Branches on vLLM's second runner: one forward a cycle, with nothing read back.

The next step is planned before it is known whether a branch was hit. So a miss runs no draft forward: its next forward
decides one token, and has a mask branch after it, which is hit for sure. That takes no more forwards: the first draft
is verified while the others are drafted (``docs/branches.md``). Only how many branches fit is known on the host.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context

from vllm_nld.attention.backend import BranchedMetadata, DraftMetadata
from vllm_nld.branches.places import BY_RANK, MASK_WORTH, RANKS
from vllm_nld.ops import BIDIRECTIONAL
from vllm_nld.ops.sizes import power_of_two
from vllm_nld.options import MOST_BRANCHES
from vllm_nld.speculator import branch_kernels as kernels
from vllm_nld.speculator.buffers import OWN_STREAM, Shape, StepTensors, to_device
from vllm_nld.speculator.table import Numbers, RequestTable

COUNTED = ("run", "tokens", "guess", "mask")
"""Names of the kernels' counters, in order."""
_PAGES_AT_ONCE = 256


@dataclass(frozen=True)
class Laid:
    """The branches of a step.

    Attributes:
        slot_of_row: int ``[rows]``, on the host; -1 where a row does not branch.
        count: branches of a slot.
        length: tokens of a branch.
        hidden: ``[tokens, hidden]`` of the branches, once the step has run.
    """

    slot_of_row: Numbers
    count: int
    length: int
    hidden: Tensor | None = None


@dataclass(frozen=True)
class Drafting:
    """What the drafts of a step are chosen from.

    Attributes:
        hidden: ``[drafts, hidden]``, those of every slot in a row.
        draws: whose each is, its position, and its column; int64 ``[drafts]`` each.
    """

    hidden: Tensor
    draws: tuple[Tensor, Tensor, Tensor]


class Branching:
    """Lays out the branches of each step, and drafts from those that were hit.

    Args:
        shape: of the engine's draft passes.
        table: what requests ask for.
        max_tokens: of a step, branches included.
        adapts: whether there is a draft adapter.
        dtype: of the model.
        slots: int64, vLLM's buffer of cache slots: those of a step, then what is not written.

    Attributes:
        counters: int64, on the device, as :data:`COUNTED`.
    """

    def __init__(
        self, shape: Shape, table: RequestTable, max_tokens: int, adapts: bool, dtype: torch.dtype, slots: Tensor
    ) -> None:
        self.shape, self.max_tokens = shape, max_tokens
        self._table, self._adapts, self._dtype, self._slots = table, adapts, dtype, slots
        self._device = device = slots.device
        requests = shape.requests
        self._planned = np.zeros(requests, dtype=bool)
        self._planned_prefix = torch.full((requests,), -1, dtype=torch.int32, device=device)
        self._places = torch.zeros(requests, MOST_BRANCHES, dtype=torch.int32, device=device)
        self._guesses = torch.full_like(self._places, kernels.IDLE)
        self.counters = torch.zeros(len(COUNTED), dtype=torch.int64, device=device)
        self._laid: Laid | None = None

    def forget(self, indices: list[int]) -> None:
        """Forget the plans of earlier requests with these indices."""
        self._planned[indices] = False
        self._planned_prefix.index_fill_(0, to_device(np.array(indices), self._device), -1)

    # Before a step

    def lay_out(self, batch: Any, block_table: Tensor) -> Laid | None:
        """Prepare the branches of a step's requests, as far as they fit; None if there are none.

        Args:
            batch: vLLM's ``InputBatch``.
            block_table: int32 ``[rows, pages]``.
        """
        indices = batch.idx_mapping_np
        rows = self._planned[indices]
        self._planned[indices] = False
        self._laid = None
        if not rows.any():
            return None
        size = self._fitting(indices[rows], batch.num_tokens_after_padding)
        if size is None:
            return None
        self._laid = Laid(np.where(rows, np.cumsum(rows) - 1, -1), *size)
        self._fill(self._laid, batch, block_table)
        return self._laid

    def _fitting(self, indices: Numbers, tokens: int) -> tuple[int, int] | None:
        """Return how many branches of how many tokens each request can have next to ``tokens`` others."""
        count, length = self._table.branches(indices)
        count = min(count, (self.max_tokens - tokens) // (len(indices) * length))
        return (count, length) if count > 0 else None

    def _fill(self, laid: Laid, batch: Any, block_table: Tensor) -> None:
        rows = np.flatnonzero(laid.slot_of_row >= 0)
        branches, buffers = len(rows) * laid.count, self._buffers
        kernels.lay_out_kernel[(branches,)](
            to_device(rows.astype(np.int32), self._device), batch.idx_mapping, batch.seq_lens, batch.query_start_loc,
            block_table, block_table.stride(0),
            self._planned_prefix, self._places, self._guesses, self._places.stride(0),
            self._table.branches_on_device[0], self._table.on_device[2],
            buffers.ids, buffers.positions, buffers.prefix_lens, buffers.adapted,
            buffers.pages(branches), self.shape.pages, buffers.live, self.counters,
            laid.count, laid.length, self.shape.max_model_len, self.shape.mask_token_id, self.shape.page_size,
            LENGTH=power_of_two(laid.length), PAGES=_PAGES_AT_ONCE,
        )  # fmt: skip

    @functools.cached_property
    def _buffers(self) -> BranchBuffers:
        return BranchBuffers(self.max_tokens, self.shape.pages, self._dtype, self._device)

    def metadata(self, laid: Laid, causal: dict[str, Any], tokens: int, max_prefix: int) -> dict[str, Any]:
        """Return the layers' attention metadata of a step with branches.

        Args:
            laid: the branches.
            causal: the platform's metadata by layer, of the step without them.
            tokens: of the step without them, padding included.
            max_prefix: bound of the branches' prefixes.
        """
        branches = (int(laid.slot_of_row.max()) + 1) * laid.count
        buffers, added = self._buffers, branches * laid.length
        blocks = DraftMetadata(
            buffers.pages(branches),
            buffers.prefix_lens[:branches],
            buffers.starts(laid.length)[: branches + 1],
            buffers.kinds[:branches],
            laid.length,
            max_prefix,
            BIDIRECTIONAL,
        )
        adapted = None
        if self._adapts:
            adapted = torch.cat((buffers.adapted.new_zeros(tokens, 1), buffers.adapted[:added]))
        known = {id(own): BranchedMetadata(own, tokens, blocks, adapted) for own in causal.values()}
        return {name: known[id(own)] for name, own in causal.items()}

    # During a step

    def extend(self, arguments: dict[str, Any]) -> dict[str, Any] | None:
        """Return the arguments of a forward with its branches' tokens; None if the forward has none."""
        branched = branched_metadata()
        if branched is None:
            return None
        context, added = get_forward_context(), len(branched.branches.prefix_lens) * branched.branches.max_length
        context.slot_mapping = dict.fromkeys(context.slot_mapping, self._slots[: branched.tokens + added])
        context.cudagraph_runtime_mode = CUDAGraphMode.NONE  # no piecewise graph has this size
        ids = torch.cat((arguments["input_ids"], self._buffers.ids[:added]))
        positions = torch.cat((arguments["positions"], self._buffers.positions[:added]))
        return arguments | {"input_ids": ids, "positions": positions}

    def part(self, hidden: Tensor) -> Tensor:
        """Keep the branches' part of a forward's output ``[tokens, hidden]``, if it has one, and return the rest."""
        branched = branched_metadata()
        if branched is None or self._laid is None:
            return hidden
        self._laid = replace(self._laid, hidden=hidden[branched.tokens :])
        return hidden[: branched.tokens]

    # After a step

    def rows(self, indices: Numbers, drafting: Numbers) -> Numbers:
        """Return bool per row: whether it drafts by branches, and so no draft pass has to.

        None does if the next step is likely to have no room: it is taken to have the same requests.

        Args:
            indices: of the step's requests.
            drafting: bool ``[rows]``, which ones draft.
        """
        rows = drafting & self._table.branching(indices)
        if rows.any() and self._fitting(indices[rows], len(indices) * self.shape.block_length) is None:
            rows = np.zeros_like(rows)
        return rows

    def find_hits(self, rows: Numbers, indices: Numbers, step: StepTensors, num_sampled: Tensor, valid: Tensor) -> Hits:
        """Return what the step's rows drafted in its branches.

        Args:
            rows: bool, as :meth:`rows` returned; there must be one.
            indices: of the step's requests.
            step: the step's results.
            num_sampled: int32 ``[rows]``, tokens that it decided.
            valid: int32 ``[requests]``, written: how many drafts each has now.
        """
        laid, self._laid = self._laid, None
        most, length = self._table.branches(indices[rows])
        slots = np.where(rows, np.cumsum(rows) - 1, -1).astype(np.int32)
        count = int(rows.sum())
        if laid is None or laid.hidden is None:
            laid = Laid(np.full(len(rows), -1), 1, length)
        drafts = laid.length - 1
        hits = Hits(
            to_device(slots, self._device), laid, most, count, self.shape.block_length - 1,
            *(torch.empty(count * drafts, dtype=torch.int64, device=self._device) for _ in range(3)),
            torch.empty(count, dtype=torch.int32, device=self._device),
        )  # fmt: skip
        table = self._table
        kernels.hit_kernel[(len(rows),)](
            hits.slot_of_row, to_device(laid.slot_of_row.astype(np.int32), self._device), step.requests, step.seq_lens,
            step.num_rejected, num_sampled, step.last_sampled,
            self._places, self._guesses, self._places.stride(0), self._buffers.live,
            table.branches_on_device[1], table.on_device[1],
            hits.sources, hits.draw_requests, hits.draw_positions, hits.block_lens, valid, self.counters,
            laid.count, laid.length, self.shape.max_model_len, self.shape.pad_request, OWN_STREAM,
            LENGTH=power_of_two(laid.length),
        )  # fmt: skip
        self._planned[indices] |= rows
        return hits

    def plan(
        self, hits: Hits, step: StepTensors, tokens: Tensor, likely: Tensor, chances: Tensor, drafts: Tensor
    ) -> None:
        """Hand out what was drafted, and choose where the next verification branches.

        Args:
            hits: as :meth:`find_hits` returned.
            step: the step's results.
            tokens: int64 ``[slots * drafts]``, chosen.
            likely: int64 ``[slots * drafts, RANKS]``, the best candidates.
            chances: float32, their probabilities.
            drafts: int64 ``[rows, steps]``, written.
        """
        table, length = self._table, hits.laid.length
        ranks = likely.shape[1]
        counts, _, looks_past = table.branches_on_device
        kernels.plan_kernel[(len(hits.slot_of_row),)](
            hits.slot_of_row, step.requests, step.seq_lens, step.num_rejected, step.last_sampled, hits.block_lens,
            tokens, likely.contiguous(), chances.contiguous(), counts, looks_past, drafts, drafts.stride(0),
            self._planned_prefix, self._places, self._guesses, self._places.stride(0),
            length, hits.most, self.shape.max_model_len, MASK_WORTH, *BY_RANK,
            PLACES=power_of_two(length), COLUMNS=power_of_two(RANKS + 1), RANKS=ranks,
            STEPS=power_of_two(self.shape.block_length),
        )  # fmt: skip


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


def branched_metadata() -> BranchedMetadata | None:
    """Return the metadata of the forward in progress if it has branches."""
    metadata = get_forward_context().attn_metadata
    found = next(iter(metadata.values()), None) if isinstance(metadata, dict) else None
    return found if isinstance(found, BranchedMetadata) else None


class BranchBuffers:
    """What a step's branches read.

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
        self.adapted = torch.zeros(tokens, 1, dtype=dtype, device=device)
        self.prefix_lens = torch.zeros(branches, dtype=torch.int32, device=device)
        self.live = torch.zeros(branches, dtype=torch.int32, device=device)
        self.kinds = torch.full((branches,), BIDIRECTIONAL, dtype=torch.int32, device=device)
        self._starts = torch.arange(branches + 1, dtype=torch.int32, device=device)
        self._starts_by_length: dict[int, Tensor] = {}
        self._pages = torch.zeros(0, pages, dtype=torch.int32, device=device)

    def pages(self, branches: int) -> Tensor:
        """Return room for the pages of so many branches, int32 ``[branches, pages]``."""
        if len(self._pages) < branches:
            self._pages = self._pages.new_zeros(power_of_two(branches), self._pages.shape[1])
        return self._pages[:branches]

    def starts(self, length: int) -> Tensor:
        """Return where branches of ``length`` tokens start."""
        if length not in self._starts_by_length:
            self._starts_by_length[length] = self._starts * length
        return self._starts_by_length[length]
