"""Filling blocks: run the target model bidirectionally over [cached prefix, block] until no mask is left.

Nothing is written to the KV cache: the forward context carries no slot mappings. Drafts of self-speculation and blocks
of diffusion differ in their rules only, and share their forwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import set_forward_context

from vllm_nld.attention.backend import BlockTable, DraftMetadata, block_table, page_layout
from vllm_nld.draft_pass.block import Block
from vllm_nld.draft_pass.memory import CHUNK_BYTES, DRAWN_BYTES, ProfiledDraft, rows_in
from vllm_nld.draft_pass.selection import needed, needs_logits, select
from vllm_nld.draft_pass.token_choice import DraftChoice
from vllm_nld.model.best_tokens import Best, best_tokens, probability_of
from vllm_nld.model.draft_adapter import load_adapter
from vllm_nld.model.target import is_called_with_embeddings, last_hidden, text_model
from vllm_nld.ops.arguments import BIDIRECTIONAL
from vllm_nld.ops.sizes import round_size

if TYPE_CHECKING:
    from vllm_nld.draft_pass.learned_sampler import LearnedSampler


class DraftPass:
    """Runs bidirectional forwards on the target's weights and cache.

    Attributes:
        forwards: model forwards so far, for the NFE.
        block_forwards: the same, counted once per block that took part.
        has_adapter: whether drafts run with the draft adapter.
        activate_tasks: called with blocks, tokens and logits rows before a forward, if requests may have LoRAs.
        compact: leave blocks that are done out of the next forward. Off only to measure what it saves.
    """

    def __init__(self, vllm_config: VllmConfig, model: Any, learned_sampler: LearnedSampler | None = None) -> None:
        config = vllm_config.model_config.hf_config
        self.vllm_config = vllm_config
        self.model = model = text_model(model)
        self.learned_sampler = learned_sampler
        self.mask_token_id: int = config.mask_token_id
        self.vocab_size: int = vllm_config.model_config.get_vocab_size()
        self.embeds = is_called_with_embeddings(vllm_config.model_config)
        self.max_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self.last_position = vllm_config.model_config.max_model_len - 1
        self.device = next(model.parameters()).device
        self.forwards = 0
        self.block_forwards = 0
        self.compact = True
        context = vllm_config.compilation_config.static_forward_context
        self.layers = {name: layer for name, layer in context.items() if hasattr(layer, "kv_cache")}
        self.table: BlockTable = block_table(vllm_config)
        self.has_adapter: bool = model.draft_lora is not None
        if self.has_adapter:
            load_adapter(model.draft_lora, model)
        self.activate_tasks: Callable[[Sequence[Block], int, int], None] | None = None

    def find_layout(self) -> None:
        """Find the cache's page layout now, at start-up, and not with the first request.

        Raises:
            NLDError: the layout is unknown.
        """
        page_layout(next(iter(self.layers.values())))

    @torch.inference_mode()
    def time_forward(self, tokens: int, block_length: int) -> float:
        """Return the seconds of a forward over ``tokens`` masks in blocks that have no prefix; it is not counted."""
        rows = -(-tokens // block_length)
        length = -(-tokens // rows)
        blocks = [Block(0, [self.mask_token_id] * length, adapted=True) for _ in range(rows)]
        counts = self.forwards, self.block_forwards
        started = time.perf_counter()
        self.best(blocks).tokens.tolist()  # reading the result waits for a device to finish
        seconds = time.perf_counter() - started
        self.forwards, self.block_forwards = counts
        return seconds

    def locate(self, rows: Sequence[int], blocks: Sequence[Block]) -> None:
        """Note the pages that hold the blocks' prefixes.

        Args:
            rows: of each block's request, in the batch of the step that has just run or is being run.
            blocks: there may be several of a request.
        """
        longest = max((block.prefix for block in blocks), default=0)
        if longest:
            layer = next(iter(self.layers.values()))
            pages = self.table.rows(rows, longest, page_layout(layer).page_size(layer))
            for block, own in zip(blocks, pages, strict=True):
                block.pages = own

    @torch.inference_mode()
    def run(self, blocks: Sequence[Block], leave: Callable[[int], bool] | None = None) -> None:
        """Fill every block in place.

        Args:
            blocks: those that are done already take no part.
            leave: asked after every forward, with the number of forwards so far, whether to stop with blocks unfilled.
        """
        forwards = 0
        while active := [block for block in blocks if not block.is_done(self.mask_token_id)]:
            for group in self._groups(active if self.compact else blocks):
                self._advance(group)
            forwards += 1
            if leave is not None and leave(forwards):
                break

    def _groups(self, blocks: Sequence[Block]) -> list[list[Block]]:
        """Split into batches of at most ``max_num_batched_tokens`` tokens, for which the model is compiled."""
        groups: list[list[Block]] = []
        used = 0
        for block in blocks:
            if groups and used + block.length <= self.max_tokens:
                groups[-1].append(block)
                used += block.length
            else:
                groups.append([block])
                used = block.length
        return groups

    def _advance(self, group: list[Block]) -> None:
        """Run one forward over a batch, of which the blocks that are done are here only if not compacted away."""
        active = [block for block in group if not block.is_done(self.mask_token_id)]
        if not active:
            return
        self.settle(group, active, self._hidden(group))

    @torch.inference_mode()
    def settle(self, group: Sequence[Block], active: Sequence[Block], hidden: Tensor) -> None:
        """Decide positions of ``active`` blocks by the last layer's output ``[tokens, hidden]`` of a ``group``."""
        if not any(map(needs_logits, active)):
            self._commit(active, *self._best(hidden, group, active))
            return
        for blocks in self._chunks(active):
            logits = self._logits(hidden, group, blocks)
            self._commit(blocks, *self._choose(blocks, logits), logits)

    def _chunks(self, blocks: Sequence[Block]) -> list[list[Block]]:
        """Split into groups whose logits in float32 take at most ``CHUNK_BYTES``, or one block's."""
        most = rows_in(CHUNK_BYTES, self.vocab_size)
        chunks: list[list[Block]] = []
        used = 0
        for block in blocks:
            # The learned sampler sees whole blocks.
            whole = "learned" in needed([block])
            rows = block.length if whole else block.tokens.count(self.mask_token_id)
            if chunks and used + rows <= most:
                chunks[-1].append(block)
                used += rows
            else:
                chunks.append([block])
                used = rows
        return chunks

    def best(self, blocks: Sequence[Block]) -> Best:
        """Run one forward and return the masked positions' most probable tokens, in block order."""
        return self._best(self._hidden(blocks), blocks, blocks)

    def _best(self, hidden: Tensor, group: Sequence[Block], blocks: Sequence[Block]) -> Best:
        """Return the most probable tokens of some blocks of a forward, of whose tokens ``hidden`` is the last layer."""
        wanted, masked = self._wanted(group, blocks)
        tokens, probability = best_tokens(self.model, hidden[wanted])
        return Best(tokens[:masked], probability[:masked])

    def _logits(self, hidden: Tensor, group: Sequence[Block], blocks: Sequence[Block]) -> Tensor:
        """Return the same rows' logits, float32 ``[masked, vocab]``."""
        wanted, masked = self._wanted(group, blocks)
        if self.activate_tasks is not None and len(blocks) < len(group):
            self.activate_tasks(blocks, sum(block.length for block in blocks), wanted.numel())
        logits: Tensor = self.model.compute_logits(hidden[wanted])
        return logits[:masked].float()

    def _wanted(self, group: Sequence[Block], blocks: Sequence[Block]) -> tuple[Tensor, int]:
        """Return where a forward over ``group`` has the masked positions of ``blocks``, int64, and how many there are.

        Row i of a bidirectional pass predicts position i. More indices are padding.
        """
        chosen = set(map(id, blocks))
        masked = [id(block) in chosen and token == self.mask_token_id for block in group for token in block.tokens]
        wanted = torch.tensor(masked).nonzero().squeeze(1)
        return _rounded(wanted, self.max_tokens).to(self.device), len(wanted)

    def _hidden(self, blocks: Sequence[Block]) -> Tensor:
        """Run one forward and return the hidden states of its tokens ``[tokens, hidden]``; more rows are padding.

        The blocks are laid end to end, ragged as they are. vLLM compiled the model for int32 ids and int64 positions,
        and dropped all guards: other ids would be misread. Nor may a CUDA graph of a causal pass be replayed.
        """
        self.forwards += 1
        self.block_forwards += len(blocks)
        ids = torch.tensor([token for block in blocks for token in block.tokens], dtype=torch.int32)
        positions = torch.cat([torch.arange(block.prefix, block.prefix + block.length) for block in blocks])
        # No block reaches past the last position; a warm-up's may.
        positions = positions.clamp_max(self.last_position)
        ids, positions = _rounded(ids, self.max_tokens), _rounded(positions, self.max_tokens)
        if self.activate_tasks is not None:
            logits = sum(block.tokens.count(self.mask_token_id) for block in blocks)
            self.activate_tasks(blocks, ids.numel(), rounded_size(logits, self.max_tokens))
        context = set_forward_context(
            self._per_layer(blocks),
            self.vllm_config,
            num_tokens=ids.numel(),
            cudagraph_runtime_mode=CUDAGraphMode.NONE,
            slot_mapping={},
        )
        with context:
            return last_hidden(self.model, ids.to(self.device), positions.to(self.device), self.embeds)

    def _per_layer(self, blocks: Sequence[Block]) -> dict[str, DraftMetadata] | None:
        """Return the layers' metadata; None, with which attention answers zeros, while there is no cache to read."""
        has_cache = next(iter(self.layers.values())).kv_cache.numel() > 0
        return dict.fromkeys(self.layers, self.metadata(blocks)) if has_cache else None

    @torch.inference_mode()
    def profile(self, requests: int, block_length: int) -> None:
        """Use as much memory as drafting ever does, for vLLM to see it, whether there is a cache yet or not.

        That is: the logits of a verification of all the blocks, which are still at hand when the next drafts are made,
        the probabilities of as many drawn drafts as are allowed, and what a forward needs on top.

        Args:
            requests: at most that many draft together, as far as their tokens fit into a step.
            block_length: tokens of their blocks, seed included.
        """
        rows = rows_in(DRAWN_BYTES, self.vocab_size)
        counts = self.forwards, self.block_forwards
        blocks = [
            Block(0, [0] + [self.mask_token_id] * (block_length - 1), adapted=True)
            for _ in range(max(1, min(requests, self.max_tokens // block_length)))
        ]
        for block in blocks[: max(1, rows // (block_length - 1))]:
            block.choice = ProfiledDraft()
        hidden = self._hidden(blocks)
        if self.activate_tasks is not None:
            self.activate_tasks(blocks, len(hidden), len(hidden))
        verified = self.model.compute_logits(hidden)
        self._advance(blocks)
        del verified
        self.forwards, self.block_forwards = counts

    def metadata(self, blocks: Sequence[Block]) -> DraftMetadata:
        """Return what attention must know of blocks that are laid end to end; they are located."""
        lengths, prefixes = [block.length for block in blocks], [block.prefix for block in blocks]
        longest = max(prefixes)
        if longest:
            pages = pad_sequence([self._pages(block) for block in blocks], batch_first=True)
        else:
            pages = torch.zeros(len(blocks), 0, dtype=torch.int32, device=self.device)

        def ints(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32).to(self.device)

        starts = ints([0, *accumulate(lengths)])
        kinds = ints([BIDIRECTIONAL] * len(blocks))
        return DraftMetadata(
            pages,
            ints(prefixes),
            starts,
            kinds,
            max(lengths),
            longest,
            BIDIRECTIONAL,
            self._adapted(blocks),
            sum(lengths),
        )

    def _adapted(self, blocks: Sequence[Block]) -> Tensor | slice | None:
        """Return which tokens of a forward the draft adapter applies to."""
        adapted = [block.adapted for block in blocks]
        if not any(adapted) or not self.has_adapter:
            return None
        if all(adapted):
            return slice(None)
        by_token = torch.tensor([block.adapted for block in blocks for _ in block.tokens], device=self.device)
        return by_token.nonzero().squeeze(1)

    def _pages(self, block: Block) -> Tensor:
        if block.prefix == 0:
            return torch.zeros(0, dtype=torch.int32, device=self.device)
        assert block.pages is not None, "a block is located before its first forward"
        return block.pages

    def _commit(
        self, blocks: Sequence[Block], tokens: Tensor, confidence: Tensor, logits: Tensor | None = None
    ) -> None:
        """Decide which of the masked positions' tokens to commit, and write those into the blocks.

        Args:
            blocks: none of them is done.
            tokens: int64 ``[masked]``.
            confidence: float32 ``[masked]``, their probability.
            logits: float32 ``[masked, vocab]``; needed if a block's rule judges distributions.
        """
        masked = _padded([[token == self.mask_token_id for token in block.tokens] for block in blocks])
        dense = torch.zeros(masked.shape)
        dense[masked] = confidence.cpu()
        entropy = None
        if logits is not None and "entropy" in needed(blocks):
            entropy = torch.zeros(masked.shape)
            entropy[masked] = torch.special.entr(logits.softmax(-1)).sum(-1).cpu()
        chosen = torch.full(masked.shape, self.mask_token_id)
        chosen[masked] = tokens.cpu()
        if logits is not None and any(block.ranked for block in blocks):
            _rank(blocks, masked, logits)
        committed = select(blocks, masked, dense, entropy, self._scores(blocks, logits, masked))
        # One conversion each: reading tensors element by element costs more than the selection itself.
        for block, row, values, surety in zip(blocks, committed.tolist(), chosen.tolist(), dense.tolist(), strict=True):
            block.passes += 1
            for position in range(block.length):
                if row[position]:
                    block.tokens[position] = values[position]
                    block.confidence[position] = surety[position]

    def _choose(self, blocks: Sequence[Block], logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return a token per masked position, int64 ``[masked]``, and how sure it is, float32 ``[masked]``."""
        tokens = logits.argmax(-1)
        drawn: list[tuple[slice, DraftChoice]] = []
        start = 0
        for block in blocks:
            positions = [i for i, token in enumerate(block.tokens) if token == self.mask_token_id]
            if block.choice is not None:
                rows = slice(start, start + len(positions))
                decided = [token for token in block.tokens if token != self.mask_token_id]
                tokens[rows] = block.choice.choose(logits[rows], positions, decided, block.passes + 1)
                if isinstance(block.choice, DraftChoice):
                    drawn.append((rows, block.choice))
            start += len(positions)
        # Where a request's constraints leave no token, any may be chosen; but with the mask no block would ever end.
        tokens = torch.where(tokens == self.mask_token_id, logits.argmax(-1), tokens)
        confidence = probability_of(tokens, logits)
        for rows, choice in drawn:
            confidence[rows] = choice.peak
        return tokens, confidence

    def _scores(self, blocks: Sequence[Block], logits: Tensor | None, masked: Tensor) -> Tensor | None:
        """Return the learned sampler's scores, float ``[rows, length]``, if a row asks for them."""
        rows = [row for row, block in enumerate(blocks) if "learned" in needed([block])]
        if logits is None or not rows:
            return None
        assert self.learned_sampler is not None, "admission refuses the sampler where there is none"
        dense = logits.new_zeros(*masked.shape, logits.shape[-1])
        dense[masked.to(logits.device)] = logits
        ids = torch.full(masked.shape, self.mask_token_id)
        present = torch.zeros_like(masked)
        for row, block in enumerate(blocks):
            ids[row, : block.length] = torch.tensor(block.tokens)
            present[row, : block.length] = True
        columns = (tensor[rows].to(logits.device) for tensor in (ids, masked, present))
        score = torch.zeros(masked.shape)
        score[rows] = self.learned_sampler.scores(dense[rows], *columns).cpu()
        return score


def _rank(blocks: Sequence[Block], masked: Tensor, logits: Tensor) -> None:
    """Keep the masked positions' most probable tokens, of logits ``[masked, vocab]``, where a block wants them."""
    best, tokens = logits.topk(min(max(block.ranked for block in blocks), logits.shape[-1]), dim=-1)
    chances = (best - torch.logsumexp(logits, -1, keepdim=True)).exp()
    places = masked.nonzero().tolist()
    for (row, position), likely, own in zip(places, tokens.tolist(), chances.tolist(), strict=True):
        block = blocks[row]
        if block.ranked:
            block.candidates[position] = likely[: block.ranked], own[: block.ranked]


def _rounded(values: Tensor, limit: int) -> Tensor:
    """Repeat the last value up to a size that kernels exist for, but not beyond ``limit``."""
    return torch.cat((values, values[-1:].expand(rounded_size(len(values), limit) - len(values))))


def rounded_size(size: int, limit: int) -> int:
    """Return the next size that kernels exist for, but not beyond ``limit``."""
    return max(size, min(round_size(size), limit))


def _padded(rows: list[list[bool]]) -> Tensor:
    """Return bool ``[rows, longest]``, False after the end of a shorter row."""
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [False] * (longest - len(row)) for row in rows])
