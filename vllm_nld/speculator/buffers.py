"""The draft pass's inputs in buffers of fixed address and size, as CUDA graphs want them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_nld.attention.backend import DraftMetadata
from vllm_nld.ops import BIDIRECTIONAL
from vllm_nld.ops.sizes import power_of_two
from vllm_nld.speculator import kernels

OWN_STREAM = 1 << 30
"""Added to a position where a draft's noise must differ from the verifier's; no text is this long."""
_PAGES_AT_ONCE = 256


@dataclass(frozen=True)
class Shape:
    """Sizes of an engine's draft passes.

    Attributes:
        requests: most requests of a step.
        block_length: tokens of the longest block, seed included.
        pages: width of vLLM's block table.
        page_size: tokens of a KV page.
        max_model_len: tokens of the longest text.
        mask_token_id: the token at the places that a pass drafts.
        pad_request: request index of padding: -1, or 0 where vLLM's sampler would read out of bounds with -1.
    """

    requests: int
    block_length: int
    pages: int
    page_size: int
    max_model_len: int
    mask_token_id: int
    pad_request: int = -1


@dataclass(frozen=True)
class StepTensors:
    """What vLLM's runner hands over after a step, all on the device.

    Attributes:
        requests: int64 ``[rows]``, each row's request.
        seq_lens: int32 ``[rows]``, tokens that the step has run, those before it included.
        num_rejected: int32 ``[rows]``, how many of them were rejected drafts.
        last_sampled: int64 ``[requests, 1]``.
        block_table: int32 ``[rows, pages]``.
        temperature: float32 ``[requests]``.
        seeds: int64 ``[requests]``.
    """

    requests: Tensor
    seq_lens: Tensor
    num_rejected: Tensor
    last_sampled: Tensor
    block_table: Tensor
    temperature: Tensor
    seeds: Tensor


class DraftBuffers:
    """Everything that a draft pass reads, and its results; filled by one kernel.

    Attributes:
        drafts: int64 ``[requests, steps]``, by the batch's rows: what the speculator returns.
        valid: int32 ``[requests]``, by request: how many of its last drafts count.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.device = shape, device
        rows, block, steps = shape.requests, shape.block_length, shape.block_length - 1

        def ints(*size: int, wide: bool = False) -> Tensor:
            return torch.zeros(*size, dtype=torch.int64 if wide else torch.int32, device=device)

        # vLLM compiles the model for int32 ids and int64 positions.
        self._ids, self._positions = ints(rows * block), ints(rows * block, wide=True)
        self._prefix_lens = ints(rows)
        self._kinds = torch.full((2 * rows,), BIDIRECTIONAL, dtype=torch.int32, device=device)
        self._adapted = torch.zeros(rows * block, 1, dtype=dtype, device=device)
        self._pages = ints(rows, shape.pages)
        self._row_of_slot, self._block_lens = ints(rows), ints(rows)
        self._draw_requests, self._draw_positions = ints(rows * steps, wide=True), ints(rows * steps, wide=True)
        self.temperature = torch.zeros(rows, dtype=torch.float32, device=device)
        self.seeds, self.valid = ints(rows, wide=True), ints(rows)
        self.drafts = ints(rows, steps, wide=True)
        self._starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._starts_by_slot: dict[int, Tensor] = {}
        self._slots: tuple[bytes, Tensor] | None = None
        self._columns_by_slot = {block: torch.arange(steps, device=device).repeat(rows)}

    def slot_of_row(self, drafting: np.ndarray[Any, np.dtype[Any]]) -> Tensor:
        """Return each row's slot on the device, int32 ``[rows]``; -1 where it does not draft.

        Most steps have the rows of the step before, and nothing is copied.

        Args:
            drafting: bool ``[rows]``.
        """
        key = drafting.tobytes()
        if self._slots is None or self._slots[0] != key:
            slots = np.where(drafting, np.cumsum(drafting) - 1, -1).astype(np.int32)
            self._slots = key, to_device(slots, self.device)
        return self._slots[1]

    def fill(
        self, slot_of_row: Tensor, step: StepTensors, tables: tuple[Tensor, Tensor, Tensor], used: int, padded: int,
        slot_length: int,
    ) -> None:  # fmt: skip
        """Prepare a draft pass of ``padded`` slots, of which the first ``used`` belong to requests.

        Args:
            slot_of_row: int32 ``[rows]``, on the device; -1 for rows that do not draft.
            step: results of the step before the pass.
            tables: block lengths, kinds of verification, and use of the adapter, int32 ``[requests]`` each.
            used: slots of requests.
            padded: slots of the pass.
            slot_length: tokens of a slot; longer blocks are cut.
        """
        shape, rows = self.shape, len(slot_of_row)
        kernels.prepare_kernel[(rows + padded - used,)](
            slot_of_row, step.requests, step.seq_lens, step.num_rejected, step.last_sampled,
            step.block_table, step.block_table.stride(0), *tables, step.temperature, step.seeds,
            self._ids, self._positions, self._prefix_lens, self._adapted,
            self._pages, self._pages.stride(0), self._row_of_slot, self._block_lens,
            self._draw_requests, self._draw_positions,
            self.temperature, self.seeds, self.valid, self.drafts, self.drafts.stride(0),
            rows, used, slot_length, shape.max_model_len, shape.mask_token_id, shape.page_size, shape.pad_request,
            OWN_STREAM, TOKENS=power_of_two(slot_length), PAGES=_PAGES_AT_ONCE,
            STEPS=power_of_two(shape.block_length),
        )  # fmt: skip

    def inputs(self, first: int, slots: int, slot_length: int) -> tuple[Tensor, Tensor]:
        """Return token ids and positions of some slots, int32 and int64 ``[slots * slot_length]``."""
        tokens = slice(first * slot_length, (first + slots) * slot_length)
        return self._ids[tokens], self._positions[tokens]

    def metadata(
        self, first: int, slots: int, slot_length: int, max_prefix: int, adapts: bool, whole: bool = True,
        in_graph: bool = False,
    ) -> DraftMetadata:  # fmt: skip
        """Return the attention metadata of some slots.

        Args:
            first: the first slot.
            slots: how many.
            slot_length: tokens of each.
            max_prefix: bound of their prefixes.
            adapts: whether there is a draft adapter.
            whole: whether blocks see all of their slots. Else what a shorter one leaves of its slot attends by itself.
            in_graph: whether a CUDA graph is captured.
        """
        rows, tokens = slice(first, first + slots), slice(first * slot_length, (first + slots) * slot_length)
        pages, prefix_lens = self._pages[rows], self._prefix_lens[rows]
        starts = self._starts_of(slot_length)[: slots + 1]
        if not whole:
            ends = starts[:-1] + self._block_lens[rows]
            starts = torch.cat((torch.stack((starts[:-1], ends), 1).flatten(), starts[-1:]))
            prefix_lens = torch.stack((prefix_lens, torch.zeros_like(prefix_lens)), 1).flatten()
            pages = pages.repeat_interleave(2, 0, output_size=2 * slots)
        return DraftMetadata(
            pages,
            prefix_lens,
            starts,
            self._kinds[: len(prefix_lens)],
            slot_length,
            max_prefix,
            BIDIRECTIONAL,
            self._adapted[tokens] if adapts else None,
            in_graph=in_graph,
        )

    def _starts_of(self, slot_length: int) -> Tensor:
        """Return where slots start; made once per length, since graphs hold its address."""
        if slot_length not in self._starts_by_slot:
            self._starts_by_slot[slot_length] = self._starts * slot_length
        return self._starts_by_slot[slot_length]

    def draws(self, first: int, slots: int, slot_length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return whose the drafts of some slots are, their positions, and their columns; ``[slots * drafts]`` each."""
        places = slice(first * (slot_length - 1), (first + slots) * (slot_length - 1))
        columns = self._columns_of(slot_length)[: slots * (slot_length - 1)]
        return self._draw_requests[places], self._draw_positions[places], columns

    def _columns_of(self, slot_length: int) -> Tensor:
        if slot_length not in self._columns_by_slot:
            columns = torch.arange(slot_length - 1, device=self.device)
            self._columns_by_slot[slot_length] = columns.repeat(self.shape.requests)
        return self._columns_by_slot[slot_length]

    def hand_out(self, tokens: Tensor, first: int, slots: int, slot_length: int) -> None:
        """Write the chosen tokens of some slots, int64 ``[slots * drafts]``, to the drafts of their rows."""
        kernels.hand_out_kernel[(slots,)](
            tokens, self._row_of_slot, self._block_lens, self.drafts, self.drafts.stride(0), first, slot_length,
            TOKENS=power_of_two(slot_length),
        )  # fmt: skip


def to_device(numbers: Any, device: torch.device) -> Tensor:
    """Bring a small numpy array to the device without waiting for it."""
    from vllm.utils.torch_utils import async_tensor_h2d

    copied: Tensor = async_tensor_h2d(numbers, device=device)
    return copied
