"""One draft: run the target model bidirectionally over [cached prefix, seed + masks] and read the filled block.

Nothing is written to the KV cache: the forward context carries no slot mappings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context

from vllm_nld.attention import BlockTable, DraftMetadata, block_table, page_layout

# What one draft forward may gather from the cache, in tokens times rows: gathering pads every row to the longest
# prefix, and vLLM's memory profile knows nothing of it.
MAX_GATHERED_TOKENS = 1 << 16


@dataclass(frozen=True)
class DraftRequest:
    """One request to draft for.

    Attributes:
        row: its row in vLLM's batch, hence in the block table.
        seed: the last sampled token; it is not cached yet and opens the block.
        prefix: tokens in the cache; the block's first position.
        length: tokens of the block, seed included; at least 2.
    """

    row: int
    seed: int
    prefix: int
    length: int


class DraftPass:
    """Runs draft passes on the target's weights and cache.

    Attributes:
        forwards: model forwards so far, for the NFE.
    """

    def __init__(self, vllm_config: VllmConfig, model: Any, threshold: float = 0.0) -> None:
        config = vllm_config.model_config.hf_config
        self.vllm_config = vllm_config
        self.model = model
        self.threshold = threshold
        self.mask_token_id: int = config.mask_token_id
        self.max_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self.last_position = vllm_config.model_config.max_model_len - 1
        self.device = next(model.parameters()).device
        self.forwards = 0
        context = vllm_config.compilation_config.static_forward_context
        self.layers = {name: layer for name, layer in context.items() if hasattr(layer, "kv_cache")}
        self.table: BlockTable = block_table(vllm_config)

    @torch.inference_mode()
    def run(self, requests: Sequence[DraftRequest]) -> list[list[int]]:
        """Return each request's drafts: ``length - 1`` token ids, the seed left out."""
        drafts: dict[int, list[int]] = {}
        for group in self._groups(requests):
            drafts |= zip((request.row for request in group), self._fill(group), strict=True)
        return [drafts[request.row] for request in requests]

    def _groups(self, requests: Sequence[DraftRequest]) -> list[list[DraftRequest]]:
        """Split into batches that a forward has room for; requests with prefixes of similar length go together.

        The model is compiled for at most ``max_num_batched_tokens`` tokens a forward.
        """
        groups: list[list[DraftRequest]] = []
        length = max(request.length for request in requests)
        for request in sorted(requests, key=lambda request: request.prefix):
            rows = len(groups[-1]) + 1 if groups else 0
            fits = rows * length <= self.max_tokens and rows * (request.prefix + length) <= MAX_GATHERED_TOKENS
            if groups and fits:
                groups[-1].append(request)
            else:
                groups.append([request])
        return groups

    def _fill(self, requests: Sequence[DraftRequest]) -> list[list[int]]:
        """Draft for one batch.

        Blocks of unequal length are padded to the longest; no token sees another block's padding or its own.

        With ``threshold`` 0 every mask is filled by one forward. Above 0 a forward commits the positions at least
        that probable (and always the best one), until no mask is left.
        """
        length = max(request.length for request in requests)
        prefixes = torch.tensor([request.prefix for request in requests])
        lengths = torch.tensor([request.length for request in requests])
        offsets = torch.arange(length)
        blocks = torch.full((len(requests), length), self.mask_token_id)
        blocks[:, 0] = torch.tensor([request.seed for request in requests])
        # Padding may lie past the last position the rotary table knows.
        positions = (prefixes[:, None] + offsets).clamp_max(self.last_position).to(self.device)
        metadata = self._metadata([request.row for request in requests], prefixes, lengths)
        masked = (offsets > 0) & (offsets < lengths[:, None])
        while masked.any():
            tokens, confidence = self._forward(blocks, positions, metadata)
            filled = self._commit(masked, confidence)
            blocks[filled] = tokens[filled]
            masked &= ~filled
        return [blocks[i, 1 : request.length].tolist() for i, request in enumerate(requests)]

    def find_layout(self) -> None:
        """Find the cache's page layout now, at start-up, and not with the first request.

        Raises:
            NLDError: the layout is unknown.
        """
        page_layout(next(iter(self.layers.values())))

    def _commit(self, masked: Tensor, confidence: Tensor | None) -> Tensor:
        """Return which masked positions this forward decides, bool ``[rows, length]``."""
        if confidence is None:
            return masked.clone()
        confidence = confidence.masked_fill(~masked, -1.0)
        best = torch.zeros_like(masked).scatter_(1, confidence.argmax(1, keepdim=True), True)
        return masked & (best | (confidence >= self.threshold))

    def _metadata(self, rows: list[int], prefixes: Tensor, lengths: Tensor) -> DraftMetadata:
        longest, length = int(prefixes.max()), int(lengths.max())
        layer = next(iter(self.layers.values()))
        page_size = page_layout(layer).page_size(layer)
        mask = None
        if int(prefixes.min()) < longest or int(lengths.min()) < length:
            cached = torch.arange(longest) < prefixes[:, None]
            fresh = torch.arange(length) < lengths[:, None]
            mask = torch.cat((cached, fresh), dim=1)[:, None, None].to(self.device)
        pages = self.table.rows(rows, longest, page_size)
        return DraftMetadata(len(rows), length, pages, longest, mask)

    def _forward(self, blocks: Tensor, positions: Tensor, metadata: DraftMetadata) -> tuple[Tensor, Tensor | None]:
        """Return predicted tokens ``[rows, length]`` and, if a threshold asks for it, their probabilities."""
        self.forwards += 1
        ids = blocks.flatten().to(self.device)
        per_layer = dict.fromkeys(self.layers, metadata)
        with set_forward_context(per_layer, self.vllm_config, num_tokens=ids.numel(), slot_mapping={}):
            hidden = self.model(input_ids=ids, positions=positions.flatten())
        # Row i of a bidirectional pass predicts position i; the seed's own row is of no use.
        rows, length = blocks.shape
        logits = self.model.compute_logits(hidden.view(rows, length, -1)[:, 1:].flatten(0, 1))
        tokens = torch.full_like(blocks, self.mask_token_id)
        tokens[:, 1:] = logits.argmax(-1).view(rows, length - 1).to(blocks.device)
        if self.threshold == 0:
            return tokens, None
        confidence = torch.zeros(blocks.shape)
        best = logits.float().softmax(-1).amax(-1)
        confidence[:, 1:] = best.view(rows, length - 1).to(confidence.device)
        return tokens, confidence
