"""The speculator of ``--speculative-config '{"model": "vllm_nld.SelfSpeculation"}'`` on vLLM's second runner.

After every step vLLM hands over tensors on the device: which tokens were decided, how many drafts were rejected. From
those a kernel prepares ``[seed, mask, mask, ...]`` of every request that drafts, the model runs once over all of them,
and the chosen tokens go to vLLM's next step. The host never reads any of them. The steps of :meth:`Speculator._draft`
are what a CUDA graph holds.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from vllm_nld import ops
from vllm_nld.attention.backend import page_layout
from vllm_nld.draft_pass.warm_up import lengths
from vllm_nld.errors import NLDError
from vllm_nld.model.best_tokens import best_tokens
from vllm_nld.model.draft_adapter import load_adapter
from vllm_nld.model.target import is_called_with_embeddings, last_hidden, text_model
from vllm_nld.serving.admission import EngineTraits
from vllm_nld.serving.ledger import Tally
from vllm_nld.speculator import kernels
from vllm_nld.speculator.branching import Branching
from vllm_nld.speculator.buffers import DraftBuffers, Shape, StepTensors, to_device
from vllm_nld.speculator.diffusion import Diffusing, Diffusion, step_numbers
from vllm_nld.speculator.graphs import DraftGraphs
from vllm_nld.speculator.table import Numbers, RequestTable, default_branches
from vllm_nld.vllm_glue import second_runner

logger = init_logger("vllm.nld.speculator")

KEPT_BYTES = 1 << 29
"""What the logits that drafts were drawn from may take, kept for vLLM's rejection sampler; allocated at start."""


class Speculator(BaseSpeculator):  # type: ignore[misc]
    """Drafts with the target model itself (vLLM's ``BaseSpeculator`` interface).

    Attributes:
        block_length: tokens of the longest block, seed included.
        table: what requests ask for.
        draft_logits: what drafts were drawn from, ``[requests, steps, vocab]``, for vLLM's rejection sampler; None if
            that would take too much memory, or this vLLM keeps none: drafts are then verified exactly.
        forwards: draft passes so far.
        branching: the branches of verify forwards; None: there can be none.
        auto_drafts: whether requests in auto mode draft after this step; the scheduler decides, and the worker says so.
    """

    supports_mm_inputs = False
    pcp_manager: Any = None

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        self.vllm_config, self.device = vllm_config, device
        self.steps: int = vllm_config.speculative_config.num_speculative_tokens
        self.block_length = self.num_query_per_req = 1 + self.steps
        self.max_requests: int = vllm_config.scheduler_config.max_num_seqs
        self.max_tokens: int = vllm_config.scheduler_config.max_num_batched_tokens
        self._traits = EngineTraits.of(vllm_config)
        self._kept = self._room_for_logits()
        self.draft_logits = None if self._kept is None else self._kept[:-1]
        self.table = RequestTable(self.max_requests, self._traits, self.draft_logits is not None)
        self.forwards, self.auto_drafts = 0, True
        self.branching: Branching | None = None
        self._fp64 = bool(getattr(vllm_config.model_config, "use_fp64_gumbel", False))
        self._embeds = is_called_with_embeddings(vllm_config.model_config)
        self._runner: Any = None
        self._table: Any = None
        self._buffers: DraftBuffers | None = None
        self._graphs: dict[bool, DraftGraphs] = {}
        self._context = vllm_config.compilation_config.static_forward_context

    def _room_for_logits(self) -> Tensor | None:
        """Return room for every request's draft logits and, last, for those of padding; None if it is too much."""
        config = self.vllm_config.model_config
        dtype = getattr(config, "head_dtype", config.dtype)
        size = (self.max_requests + 1, self.steps, config.get_vocab_size())
        fits = int(np.prod(size)) * dtype.itemsize <= KEPT_BYTES
        if not fits or not second_runner.divides_draft_logits() or not self._traits.defaults.sampled_drafts:
            return None
        return torch.zeros(size, dtype=dtype, device=self.device)

    @property
    def model(self) -> Any:
        """The target's text model. vLLM 0.26 asks for it as soon as it is loaded."""
        return text_model(self._runner.model)

    @property
    def all_forwards(self) -> int:
        """Bidirectional forwards so far: draft passes, and those that denoise."""
        return self.forwards + (self.diffusion.forwards if "diffusion" in vars(self) else 0)

    @property
    def denoised(self) -> Tally:
        """What denoising has cost so far."""
        return self.diffusion.ledger.total if "diffusion" in vars(self) else Tally()

    @property
    def buffers(self) -> DraftBuffers:
        assert self._buffers is not None, "vLLM makes the KV cache before it drafts"
        return self._buffers

    def load_model(self, model: Any) -> None:
        """Load the draft adapter for the loaded target: its weights are the draft's weights."""
        model = text_model(model)
        if model.draft_lora is not None:
            load_adapter(model.draft_lora, model)
        if self._traits.no_branches is None:
            default = default_branches(self._traits.defaults, self.block_length)
            self.branching = Branching(self.vllm_config, self.table, model, default)
        logger.info(
            "Self-speculation is active: block length %d (1 seed + %d drafts), mode %s, %s, drawn drafts verified %s",
            self.block_length,
            self.steps,
            self._traits.defaults.mode,
            "no draft adapter" if model.draft_lora is None else "draft adapter",
            "exactly" if self.draft_logits is None else "by rejection sampling, seeded ones exactly",
        )

    def attach(self, runner: Any) -> None:
        """Let the speculator see the runner's block tables, once there are some (called by the worker)."""
        self._runner = runner

    def _set_pages(self, block_tables: Any) -> None:
        """Take vLLM's block tables, and make buffers of their size."""
        if len(block_tables.input_block_tables) != 1:
            raise NLDError("self-speculation on vLLM's second runner needs one KV cache group for all layers")
        self._table = block_tables.input_block_tables[0]
        sizes = getattr(block_tables, "kernel_block_sizes", None) or block_tables.block_sizes
        config = self.vllm_config.model_config
        shape = Shape(
            self.max_requests,
            self.block_length,
            self._table.shape[1],
            sizes[0],
            self._runner.max_model_len,
            config.hf_config.mask_token_id,
            -1 if second_runner.divides_draft_logits() else 0,
        )
        self._buffers = DraftBuffers(shape, config.dtype, self.device)
        if self.branching is not None:
            self.branching.set_pages(shape, block_tables.slot_mappings[0])

    def find_layout(self) -> None:
        """Find the cache's page layout now, at start-up.

        Raises:
            NLDError: the layout is unknown, or its pages are not those of vLLM's block table.
        """
        layer = next(iter(self._layers.values()))
        found, known = page_layout(layer).page_size(layer), self.buffers.shape.page_size
        if found != known:
            raise NLDError(f"KV pages hold {found} tokens, but vLLM's block table counts pages of {known}")

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile the kernels that serving uses, before vLLM starts to watch for compilations."""
        self._rehearse(1, without_cache=False)
        buffers, states = self.buffers, self._runner.req_states

        def zeros(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(*size, dtype=dtype, device=self.device)

        row, number = zeros(1), zeros(1, dtype=torch.int64)
        seeds, temperature = zeros(self.max_requests, dtype=torch.int64), zeros(self.max_requests, dtype=torch.float32)
        step = StepTensors(number, row, row, states.last_sampled_tokens, self._table, temperature, seeds)
        for length in lengths(self.block_length)[1:]:
            buffers.fill(row - 1, step, self.table.on_device, 0, 1, length)  # a row that does not draft, and padding
            buffers.hand_out(zeros(length - 1, dtype=torch.int64), 0, 1, length)
        if self.branching is not None:
            self.branching.warm_up(step, buffers)
        sampled, starts = zeros(1, self.block_length, dtype=torch.int64), torch.arange(2, device=self.device).int()
        for every in (False, True):
            kernels.accept_kernel[(1,)](
                sampled, sampled.stride(0), row, row, number, starts, number, self.table.on_device[1], buffers.valid,
                self.last_drafts, self.last_drafts.stride(0), EVERY=every,
            )  # fmt: skip

    @functools.cached_property
    def _layers(self) -> dict[str, Any]:
        """The attention layers by name, which do not change once the model is loaded."""
        return {name: layer for name, layer in self._context.items() if hasattr(layer, "kv_cache")}

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Make the buffers, and plan the graphs, if the engine uses any for decoding: of AR steps, too."""
        self._set_pages(self._runner.block_tables)
        second_runner.add_graphs_of_single_tokens(self._runner.cudagraph_manager)
        if self.branching is not None:
            second_runner.leave_graphs(self._runner.cudagraph_manager, self.branching.leaves_graph)
        if cudagraph_mode.decode_mode() != CUDAGraphMode.FULL:
            return
        dtype = self.vllm_config.model_config.dtype
        operator = ops.implementation("block_attention", self.device.type, dtype, captured=True)
        if not operator.graph_safe:
            logger.warning("Draft passes run without CUDA graphs: the operator %s waits for the device", operator.name)
            if self.branching is not None:
                self.branching.captures = False
            return
        self._graphs = {drawn: DraftGraphs(self.vllm_config, self.device, self.block_length) for drawn in (False, True)}

    def capture(self) -> None:
        """Capture the draft pass, head and choice included, for growing numbers of requests."""
        for drawn, graphs in self._graphs.items():
            graphs.capture_passes(functools.partial(self._capture_pass, drawn))

    def _capture_pass(self, drawn: bool, slots: int) -> None:
        self._draft(0, slots, self.block_length, drawn, graph=True)

    def add_request(self, index: int, new: Any) -> None:
        """Record what a request (vLLM's ``NewRequestData``) asks for; vLLM has given it an index."""
        params = new.sampling_params
        if params is None:
            return
        options = self.table.add(index, params)
        if options.mode == "diffusion":
            prompt = len(new.prompt_token_ids or ())
            self.diffusion.add(index, Diffusing(new.req_id, params, options, prompt))

    def take_in_requests(self) -> None:
        """Bring what new requests ask for to the device; drafts of earlier ones with their indices count no more."""
        new = self.table.upload()
        if new and self._buffers is not None:
            if self.branching is not None:
                self.branching.forget(new)
            self._buffers.valid.index_fill_(0, to_device(np.array(new), self.device), 0)

    @functools.cached_property
    def diffusion(self) -> Diffusion:
        """What fills diffusion blocks; made for the first request that has any."""
        sampler = None
        if self._traits.learned_sampler is not None:
            from vllm_nld.draft_pass.learned_sampler import LearnedSampler

            sampler = LearnedSampler.load(self._traits.learned_sampler).to(self.device)
        return Diffusion(self.vllm_config, self.model, self.block_length, self._runner.max_model_len, sampler)

    @property
    def last_drafts(self) -> Tensor:
        """int64 ``[requests, steps]``, what was proposed last, by request."""
        drafts: Tensor = self._runner.req_states.draft_tokens
        return drafts

    @torch.inference_mode()
    def propose(
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: Tensor,
        aux_hidden_states: Any,
        num_sampled: Tensor,
        num_rejected: Tensor,
        last_sampled: Tensor,
        next_prefill_tokens: Tensor,
        temperature: Tensor,
        seeds: Tensor,
        *others: Any,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        is_profile: bool = False,
        **named: Any,
    ) -> Tensor:
        """Return every row's tokens to verify after its last, int64 ``[rows, steps]``.

        ``buffers.valid`` holds how many of them count, by request; the others only fill the row. The
        arguments are vLLM's.
        """
        rows = input_batch.num_reqs
        if dummy_run:
            return self._rehearse(rows, skip_attn_for_dummy_run or self._buffers is None)
        indices, decided = input_batch.idx_mapping_np, self._decided(input_batch)
        drafting = decided & self.table.drafts(indices, self.auto_drafts)
        branching = np.zeros_like(drafting)
        if self.branching is not None:
            branching = self.branching.rows(indices, drafting, input_batch.num_tokens_after_padding)
        drafting &= ~branching
        denoising = np.flatnonzero(decided & self.table.denoises(indices))
        chosen = indices[drafting]
        if len(chosen) or len(denoising) or branching.any() or self.table.offered[indices].any():
            step = StepTensors(
                input_batch.idx_mapping,
                input_batch.seq_lens,
                num_rejected,
                last_sampled,
                self._table,
                temperature,
                seeds,
            )
            self._run(drafting, chosen, step, int(input_batch.seq_lens_cpu_upper_bound.numpy()[:rows].max()))
            if self.branching is not None and branching.any():
                self.branching.draft(branching, indices, step, num_sampled, self.buffers, self._drawn)
            self.table.offered[indices] = drafting | branching
            if len(denoising):
                self._denoise(denoising, input_batch, step, num_sampled)
        return self.buffers.drafts[:rows]

    @staticmethod
    def _decided(input_batch: Any) -> Numbers:
        """Return bool per row: whether the step decided a token for it, and did more than a part of its prompt."""
        computed = input_batch.num_computed_tokens_np + input_batch.num_scheduled_tokens
        decided: Numbers = computed >= input_batch.prefill_len_np
        return decided

    def _denoise(self, rows: Numbers, input_batch: Any, step: StepTensors, num_sampled: Tensor) -> None:
        """Fill the blocks of rows that decode by diffusion, and hand out what the next causal pass is to commit."""
        chosen = input_batch.idx_mapping_np[rows]
        offered = input_batch.num_draft_tokens_per_req
        places = to_device(rows, self.device)
        numbers = step_numbers(places, step.requests, step.seq_lens, step.num_rejected, step.last_sampled, num_sampled)
        tokens = self.diffusion.propose(
            chosen.tolist(),
            [0] * len(rows) if offered is None else offered[rows].tolist(),
            numbers,
            step.block_table[places],
        )
        counts = np.array([len(own) for own in tokens], dtype=np.int32)
        padded = np.zeros((len(rows), self.steps), dtype=np.int64)
        for row, own in enumerate(tokens):
            padded[row, : len(own)] = own
        self.buffers.drafts[places] = to_device(padded, self.device)
        self.buffers.valid[to_device(chosen, self.device)] = to_device(counts, self.device)
        self.table.offered[chosen] = True

    def _run(self, drafting: Numbers, chosen: Numbers, step: StepTensors, max_prefix: int) -> None:
        """Prepare and run the passes of a step: one, unless its tokens are more than the model is compiled for."""
        used, drawn = len(chosen), bool(self.table.drawn[chosen].any())
        slot_length, whole = self.table.lengths(chosen) if used else (self.block_length, True)
        whole = whole and max_prefix + slot_length <= self.buffers.shape.max_model_len
        graphs = self._graphs.get(drawn)
        padded = graphs.slots_for(used) if graphs is not None and used else None
        if padded is not None:
            slot_length = self.block_length  # a shorter block takes the first drafts of a whole one
        slots = self.buffers.slot_of_row(drafting)
        self.buffers.fill(slots, step, self.table.on_device, used, padded or used, slot_length)
        if graphs is not None and padded is not None:
            self.forwards += 1
            graphs.replay(padded)
            return
        most = max(1, self.max_tokens // slot_length)
        for first in range(0, used, most):
            self.forwards += 1
            self._draft(first, min(most, used - first), slot_length, drawn, max_prefix=max_prefix, whole=whole)

    def _draft(
        self, first: int, slots: int, slot_length: int, drawn: bool, *, max_prefix: int | None = None,
        whole: bool = True, graph: bool = False,
    ) -> None:  # fmt: skip
        """Run the model over some slots, choose their tokens, and hand them out: what a CUDA graph holds.

        Args:
            first: the first slot.
            slots: how many.
            slot_length: tokens of each.
            drawn: whether some request's drafts are drawn; else the best tokens are taken from the ranks' own logits.
            max_prefix: bound of the prefixes; None: any.
            whole: whether blocks see all of their slots.
            graph: whether a graph is captured.
        """
        buffers, model = self.buffers, self.model
        longest = buffers.shape.max_model_len if max_prefix is None else max_prefix
        metadata = buffers.metadata(first, slots, slot_length, longest, model.draft_lora is not None, whole, graph)
        hidden = self._hidden(*buffers.inputs(first, slots, slot_length), dict.fromkeys(self._layers, metadata))
        # Row i of a bidirectional pass predicts position i; the seed is decided.
        masked = hidden.view(slots, slot_length, -1)[:, 1:].reshape(slots * (slot_length - 1), -1)
        tokens = self._choose(masked, buffers.draws(first, slots, slot_length)) if drawn else self._best(masked)
        buffers.hand_out(tokens, first, slots, slot_length)

    def _hidden(self, ids: Tensor, positions: Tensor, per_layer: Any) -> Tensor:
        """Return the last layer's output ``[tokens, hidden]``. Nothing is written to the cache."""
        with set_forward_context(
            per_layer,
            self.vllm_config,
            num_tokens=len(ids),
            cudagraph_runtime_mode=CUDAGraphMode.NONE,
            slot_mapping={},
        ):
            return last_hidden(self.model, ids, positions, self._embeds)

    def _best(self, hidden: Tensor) -> Tensor:
        return best_tokens(self.model, hidden).tokens

    def _choose(self, hidden: Tensor, draws: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Draw tokens; those of greedy requests are the best ones. Their logits are kept if there is room."""
        return self._drawn(self.model.compute_logits(hidden), draws)

    def _drawn(self, logits: Tensor, draws: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Draw a token per row of logits ``[drafts, vocab]``; ``draws`` are as of :meth:`DraftBuffers.draws`."""
        requests, positions, columns = draws
        if self._kept is not None:
            self._kept[requests, columns] = logits.to(self._kept.dtype)
            logits = logits.to(self._kept.dtype)  # they are drawn from what is kept
        return second_runner.draw(
            logits,
            requests,
            self.buffers.temperature,
            self.buffers.seeds,
            positions,
            tempered=False,
            fp64=self._fp64,
        )

    def _rehearse(self, rows: int, without_cache: bool) -> Tensor:
        """Do in a dummy run what takes most memory: a pass over as many requests as there can be in one."""
        slots = max(1, min(rows, self.max_tokens // self.block_length))
        if self.branching is not None:
            self.branching.rehearse(slots)
        if without_cache:
            ids = torch.zeros(slots * self.block_length, dtype=torch.int32, device=self.device)
            masked = self._hidden(ids, ids.long(), None).view(slots, self.block_length, -1)[:, 1:]
            self._best(masked.reshape(slots * self.steps, -1))
            return torch.zeros(rows, self.steps, dtype=torch.int64, device=self.device)
        for drawn in (False, True):
            self._draft(0, slots, self.block_length, drawn)
        return self.buffers.drafts[:rows]
