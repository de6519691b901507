"""Branches on vLLM's second runner: one forward a cycle, with nothing read back.

The next step is planned before it is known whether a branch was hit. So a miss runs no draft forward: its next forward
decides one token, and has a mask branch after it, which is hit for sure. That takes no more forwards: the first draft
is verified while the others are drafted (``docs/user/branches.md``). Only how many branches fit is known on the host.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context

from vllm_nld.attention.backend import BranchedMetadata, DraftMetadata
from vllm_nld.branches.places import BY_RANK, MASK_WORTH, RANKS
from vllm_nld.draft_pass.memory import CHUNK_BYTES, rows_in
from vllm_nld.ops import BIDIRECTIONAL
from vllm_nld.ops.sizes import power_of_two
from vllm_nld.options import MOST_BRANCHES
from vllm_nld.speculator import branch_kernels as kernels
from vllm_nld.speculator.branch_buffers import BranchBuffers, Hits, Laid
from vllm_nld.speculator.buffers import OWN_STREAM, DraftBuffers, Shape, StepTensors, to_device
from vllm_nld.speculator.table import Numbers, RequestTable

COUNTED = ("run", "tokens", "guess", "mask")
"""Names of the kernels' counters, in order."""
_PAGES_AT_ONCE = 256


class Branching:
    """Lays out the branches of each step, and drafts from those that were hit.

    Args:
        vllm_config: vLLM's.
        table: what requests ask for.
        model: the target, whose forwards it extends.
        default: branches of a request by the engine's own options, and the tokens of one; None: there are none.

    Attributes:
        counters: int64, on the device, as :data:`COUNTED`.
        undrafted: times that a request's draft forward was left out.
        is_due: whether the next step is likely to have branches.
        captures: whether CUDA graphs may hold branches.
        max_tokens: of a step, branches included.
    """

    shape: Shape
    _slots: Tensor

    def __init__(self, vllm_config: Any, table: RequestTable, model: Any, default: tuple[int, int] | None) -> None:
        self.max_tokens: int = vllm_config.scheduler_config.max_num_batched_tokens
        self._table, self._model, self._default, self.is_due = table, model, default, False
        self.captures = True
        self._dtype: torch.dtype = vllm_config.model_config.dtype
        self._device = device = table.on_device[0].device
        self._known: dict[str, tuple[bytes, Tensor]] = {}
        self._hidden_size: int = vllm_config.model_config.get_hidden_size()
        self._vocab_size: int = vllm_config.model_config.get_vocab_size()
        self._captured: dict[int, tuple[int, int]] = {}
        requests: int = vllm_config.scheduler_config.max_num_seqs
        self._planned = np.zeros(requests, dtype=bool)
        self._planned_prefix = torch.full((requests,), -1, dtype=torch.int32, device=device)
        self._places = torch.zeros(requests, MOST_BRANCHES, dtype=torch.int32, device=device)
        self._guesses = torch.full_like(self._places, kernels.IDLE)
        self.counters = torch.zeros(len(COUNTED), dtype=torch.int64, device=device)
        self.undrafted = 0
        self._seen = torch.zeros(len(COUNTED), dtype=torch.int64, pin_memory=device.type == "cuda")
        self._seen_np = self._seen.numpy()
        self._laid: Laid | None = None
        model.register_forward_pre_hook(self._extend, with_kwargs=True)
        model.register_forward_hook(self._part)

    def set_pages(self, shape: Shape, slots: Tensor) -> None:
        """Take the sizes of the engine's draft passes, and vLLM's buffer of cache slots.

        Args:
            shape: the sizes.
            slots: int64: those of a step, then what is not written.
        """
        self.shape, self._slots = shape, slots
        self._captured.clear()
        vars(self).pop("_buffers", None)

    def rehearse(self, slots: int) -> None:
        """Do in a dummy run what takes most memory, if the engine's own options ask for branches."""
        if self._default is not None:
            rows = slots * (self._default[1] - 1)
            candidates(
                self._model.compute_logits(torch.zeros(rows, self._hidden_size, dtype=self._dtype, device=self._device))
            )

    def _sent(self, name: str, numbers: Numbers) -> Tensor:
        """Return rows or slots on the device, int32. In most steps they are those of the step before."""
        key = numbers.tobytes()
        if self._known.get(name, (b"", None))[0] != key:
            self._known[name] = key, to_device(numbers.astype(np.int32), self._device)
        return self._known[name][1]

    def warm_up(self, step: StepTensors, buffers: DraftBuffers) -> None:
        """Compile the kernels for the engine's own branches, as :meth:`Speculator.warm_up` does for others."""
        count, length = self._default or (0, 1)
        count = min(count, self.max_tokens // length)
        if count == 0:
            return
        row = step.seq_lens
        batch = SimpleNamespace(idx_mapping=step.requests, seq_lens=row, query_start_loc=torch.arange(2).to(row))
        laid = Laid(np.zeros(0), 1, count, length)
        self._fill(laid, batch, step.block_table, graph=False)  # a slot of no row
        places, drafts = torch.zeros(3, laid.length - 1).to(step.requests), laid.length - 1
        hits = Hits(row - 1, laid, laid.count, 1, drafts, places[0], places[1], places[2], row.clone())
        self._find(hits, row - 1, step, row, buffers.valid)
        best = min(RANKS, self._vocab_size)
        for ranks in (1, best):
            likely = places[:1].repeat(ranks, 1).t()
            self._plan(hits, step, places[0], likely, likely.float(), buffers.drafts)
        self.counters.zero_()

    @property
    def has_pages(self) -> bool:
        """Whether there is a KV cache."""
        return "shape" in vars(self)

    def counted(self, wait: bool) -> dict[str, int]:
        """Return what branches did so far, for which it waits for the device; or else until it was last called."""
        if wait:
            self._seen.copy_(self.counters)
        counts = {name: int(self._seen_np[index]) for index, name in enumerate(COUNTED) if self._seen_np[index]}
        if not wait:
            self._seen.copy_(self.counters, non_blocking=True)
        return counts

    def forget(self, indices: list[int]) -> None:
        """Forget the plans of earlier requests with these indices."""
        self._planned[indices] = False
        self._planned_prefix.index_fill_(0, to_device(np.array(indices), self._device), -1)

    # Before a step

    def lay_out(self, batch: Any, block_table: Tensor, causal: dict[str, Any], mode: CUDAGraphMode) -> dict[str, Any]:
        """Prepare the branches of a step's requests, as far as they fit; returns the layers' attention metadata.

        Args:
            batch: vLLM's ``InputBatch``.
            block_table: int32 ``[rows, pages]``.
            causal: the metadata of the step without them.
            mode: whether a CUDA graph is going to run the step. A whole one of blocks has the branches that it was
                captured with, others have none: a plan may be older than the last step, by which the graph was chosen.
        """
        indices, tokens = batch.idx_mapping_np, batch.num_tokens_after_padding
        rows = self._planned[indices]
        self._planned[indices] = False
        self._laid, self.is_due = None, False
        graph = mode == CUDAGraphMode.FULL
        of_blocks = batch.num_reqs_after_padding * self.shape.block_length == tokens
        if mode == CUDAGraphMode.PIECEWISE or (graph and not of_blocks):
            return causal
        size = None
        if graph or rows.any():
            size = self._captured.get(tokens) if graph else self._fitting(indices[rows], tokens)
        if size is None:
            return causal
        slots = tokens // self.shape.block_length if graph else int(rows.sum())
        laid = Laid(np.where(rows, np.cumsum(rows) - 1, -1), slots, *size)
        left = self._buffers.hidden
        self._laid = replace(laid, hidden=left[: laid.tokens]) if graph and left is not None else laid
        self._fill(laid, batch, block_table, graph)
        if graph:
            return causal  # the graph has its own
        longest = int(batch.seq_lens_cpu_upper_bound.numpy()[: batch.num_reqs].max())
        return self._metadata(laid, causal, tokens, longest)

    def leaves_graph(self, description: Any) -> bool:
        """Whether the next step needs branches that a CUDA graph was not captured with."""
        uniform = description.uniform_token_count == self.shape.block_length
        whole = description.cg_mode == CUDAGraphMode.FULL and uniform
        return self.is_due and not (whole and description.num_tokens in self._captured)

    def capture(self, causal: dict[str, Any], slots: int, tokens: int) -> dict[str, Any]:
        """Return the attention metadata of a whole CUDA graph, with branches by the engine's own options if they fit.

        Args:
            causal: the platform's metadata by layer.
            slots: requests of the graph.
            tokens: of the graph without branches.
        """
        if self._default is None or not self.captures or tokens != slots * self.shape.block_length:
            return causal
        count, length = self._default
        laid = Laid(np.arange(slots), slots, count, length)
        if tokens + laid.tokens > self.max_tokens:
            return causal
        self._captured[tokens] = self._default
        return self._metadata(laid, causal, tokens, self.shape.max_model_len, graph=True)

    def _fitting(self, indices: Numbers, tokens: int) -> tuple[int, int] | None:
        """Return how many branches of how many tokens each request can have next to ``tokens`` others."""
        count, length = self._table.branches(indices)
        count = min(count, (self.max_tokens - tokens) // (len(indices) * length))
        return (count, length) if count > 0 else None

    def _fill(self, laid: Laid, batch: Any, block_table: Tensor, graph: bool) -> None:
        rows = np.full(laid.slots, -1, dtype=np.int32)
        used = np.flatnonzero(laid.slot_of_row >= 0)
        rows[: len(used)] = used
        branches, buffers = laid.slots * laid.count, self._buffers
        kernels.lay_out_kernel[(branches,)](
            self._sent("rows", rows), batch.idx_mapping, batch.seq_lens, batch.query_start_loc,
            block_table, block_table.stride(0),
            self._planned_prefix, self._places, self._guesses, self._places.stride(0),
            self._table.branches_on_device[0], self._table.on_device[2],
            buffers.ids, buffers.positions, buffers.prefix_lens, buffers.adapted,
            buffers.pages(branches, graph), self.shape.pages, buffers.live, self.counters,
            laid.count, laid.length, self.shape.max_model_len, self.shape.mask_token_id, self.shape.page_size,
            LENGTH=power_of_two(laid.length), PAGES=_PAGES_AT_ONCE,
        )  # fmt: skip

    @functools.cached_property
    def _buffers(self) -> BranchBuffers:
        return BranchBuffers(self.max_tokens, self.shape.pages, self._dtype, self._device)

    def _metadata(
        self, laid: Laid, causal: dict[str, Any], tokens: int, max_prefix: int, graph: bool = False
    ) -> dict[str, Any]:
        """Return the layers' attention metadata of a step with branches.

        Args:
            laid: the branches.
            causal: the platform's metadata by layer, of the step without them.
            tokens: of the step without them, padding included.
            max_prefix: bound of the branches' prefixes.
            graph: whether a CUDA graph is captured.
        """
        buffers, branches = self._buffers, laid.slots * laid.count
        blocks = DraftMetadata(
            buffers.pages(branches, graph),
            buffers.prefix_lens[:branches],
            buffers.starts(laid.length)[: branches + 1],
            buffers.kinds[:branches],
            laid.length,
            max_prefix,
            BIDIRECTIONAL,
            in_graph=graph,
        )
        adapted = None if self._model.draft_lora is None else buffers.factors(tokens, laid.tokens)
        known = {id(own): BranchedMetadata(own, tokens, blocks, adapted) for own in causal.values()}
        return {name: known[id(own)] for name, own in causal.items()}

    # During a step

    def _extend(self, _: Any, unnamed: Any, arguments: dict[str, Any]) -> Any:
        """Return the arguments of a forward with its branches' tokens; None if the forward has none."""
        branched = branched_metadata()
        if branched is None:
            return None
        context, added = get_forward_context(), len(branched.branches.prefix_lens) * branched.branches.max_length
        context.slot_mapping = dict.fromkeys(context.slot_mapping, self._slots[: branched.tokens + added])
        ids = torch.cat((arguments["input_ids"], self._buffers.ids[:added]))
        positions = torch.cat((arguments["positions"], self._buffers.positions[:added]))
        return unnamed, arguments | {"input_ids": ids, "positions": positions}

    def _part(self, _: Any, __: Any, hidden: Tensor) -> Tensor:
        """Keep the branches' part of a forward's output ``[tokens, hidden]``, if it has one, and return the rest."""
        branched = branched_metadata()
        if branched is None:
            return hidden
        own = hidden[branched.tokens :]
        if branched.branches.in_graph:
            if self._buffers.hidden is None:  # before the capture, in vLLM's warm-up; the largest graph comes first
                self._buffers.hidden = torch.empty_like(own)
            self._buffers.hidden[: len(own)].copy_(own)
        elif self._laid is not None:
            self._laid = replace(self._laid, hidden=own)
        return hidden[: branched.tokens]

    # After a step

    def rows(self, indices: Numbers, drafting: Numbers, tokens: int) -> Numbers:
        """Return bool per row: whether it drafts by branches, and so no draft pass has to.

        None does if the next step is likely to have no room: it is taken to be as long as this one, so that requests
        draft by themselves while prompts fill the steps.

        Args:
            indices: of the step's requests.
            drafting: bool ``[rows]``, which ones draft.
            tokens: of the step.
        """
        rows = drafting & self._table.branching(indices)
        if rows.any() and self._fitting(indices[rows], max(tokens, len(indices) * self.shape.block_length)) is None:
            rows = np.zeros_like(rows)
        return rows

    def draft(
        self, rows: Numbers, indices: Numbers, step: StepTensors, num_sampled: Tensor, buffers: DraftBuffers,
        draw: Callable[[Tensor, tuple[Tensor, Tensor, Tensor]], Tensor],
    ) -> None:  # fmt: skip
        """Hand out the drafts of branches that were hit, and plan the next ones.

        Args:
            rows: bool, as :meth:`rows` returned; there must be one.
            indices: of the step's requests.
            step: the step's results.
            num_sampled: int32 ``[rows]``, tokens that it decided.
            buffers: take the drafts.
            draw: draws from logits.
        """
        hits = self._hits(rows, indices, step, num_sampled, buffers.valid)
        if hits.laid.hidden is None:  # nothing was drafted: the next step's only branch follows the seed
            tokens = hits.sources.new_zeros(len(hits.sources))
            likely, chances = tokens[:, None], torch.zeros(len(tokens), 1, device=self._device)
        else:
            logits = self._model.compute_logits(hits.laid.hidden[hits.sources])
            likely, chances = candidates(logits)
            tokens = likely[:, 0].contiguous()
            if self._table.drawn[indices[rows]].any():
                buffers.temperature.copy_(step.temperature)
                buffers.seeds.copy_(step.seeds)
                tokens = draw(logits, (hits.draw_requests, hits.draw_positions, hits.columns))
        self._plan(hits, step, tokens, likely, chances, buffers.drafts)

    def _hits(self, rows: Numbers, indices: Numbers, step: StepTensors, num_sampled: Tensor, valid: Tensor) -> Hits:
        """Return what the step's rows drafted in its branches; ``valid`` takes how many drafts each request has."""
        laid, self._laid = self._laid, None
        most, length = self._table.branches(indices[rows])
        slots = np.where(rows, np.cumsum(rows) - 1, -1).astype(np.int32)
        count = int(rows.sum())
        if laid is None or laid.hidden is None:
            laid = Laid(np.full(len(rows), -1), 0, 1, length)
        sources, requests, positions = torch.empty(3, count * (laid.length - 1), dtype=torch.int64, device=self._device)
        hits = Hits(
            self._sent("slots", slots), laid, most, count, self.shape.block_length - 1,
            sources, requests, positions, torch.empty(count, dtype=torch.int32, device=self._device),
        )  # fmt: skip
        self._find(hits, self._sent("laid", laid.slot_of_row), step, num_sampled, valid)
        self._planned[indices] |= rows
        self.is_due = True
        self.undrafted += count
        return hits

    def _find(self, hits: Hits, laid_of_row: Tensor, step: StepTensors, num_sampled: Tensor, valid: Tensor) -> None:
        """Fill in which branches were hit.

        Args:
            hits: filled in.
            laid_of_row: int32 ``[rows]``, each row's slot among the step's branches, or -1.
            step: the step's results.
            num_sampled: int32 ``[rows]``.
            valid: int32 ``[requests]``, written.
        """
        table, laid = self._table, hits.laid
        kernels.hit_kernel[(len(laid_of_row),)](
            hits.slot_of_row, laid_of_row, step.requests, step.seq_lens,
            step.num_rejected, num_sampled, step.last_sampled,
            self._places, self._guesses, self._places.stride(0), self._buffers.live,
            table.branches_on_device[1], table.on_device[1],
            hits.sources, hits.draw_requests, hits.draw_positions, hits.block_lens, valid, self.counters,
            laid.count, laid.length, self.shape.max_model_len, self.shape.pad_request, OWN_STREAM,
            LENGTH=power_of_two(laid.length),
        )  # fmt: skip

    def _plan(
        self, hits: Hits, step: StepTensors, tokens: Tensor, likely: Tensor, chances: Tensor, drafts: Tensor
    ) -> None:
        """Hand out what was drafted, and choose where the next verification branches.

        Args:
            hits: as :meth:`_hits` returned.
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
            tokens, likely, chances, counts, looks_past, drafts, drafts.stride(0),
            self._planned_prefix, self._places, self._guesses, self._places.stride(0),
            length, hits.most, self.shape.max_model_len, MASK_WORTH, *BY_RANK,
            PLACES=power_of_two(length), COLUMNS=power_of_two(RANKS + 1), RANKS=ranks,
            STEPS=power_of_two(self.shape.block_length),
        )  # fmt: skip


def candidates(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best tokens of every row of logits ``[rows, vocab]``, and their probabilities; ``[rows, RANKS]``.

    In chunks: vLLM's profiling run sees these rows only if the engine's own options ask for branches.
    """
    vocab_size = logits.shape[-1]
    tokens, chances = list[Tensor](), list[Tensor]()
    for rows in torch.split(logits, max(1, rows_in(CHUNK_BYTES, vocab_size))):
        own = rows.float()
        best = own.topk(min(RANKS, vocab_size), dim=-1)
        tokens.append(best.indices)
        chances.append((best.values - own.logsumexp(-1, keepdim=True)).exp())
    return torch.cat(tokens), torch.cat(chances)


def branched_metadata() -> BranchedMetadata | None:
    """Return the metadata of the forward in progress if it has branches."""
    metadata = get_forward_context().attn_metadata
    found = next(iter(metadata.values()), None) if isinstance(metadata, dict) else None
    return found if isinstance(found, BranchedMetadata) else None
