"""A verify forward that also drafts: blocks after its own tokens, with their own prefixes, in the same forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context

from vllm_nld.attention.backend import BranchedMetadata, DraftMetadata
from vllm_nld.draft_pass.block import Block
from vllm_nld.draft_pass.forward import DraftPass, rounded_size


def run_with_blocks(
    draft_pass: DraftPass,
    forward: Callable[..., Tensor],
    blocks: Sequence[Block],
    rows: Sequence[int],
    input_ids: Tensor,
    positions: Tensor,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """Run a causal forward with blocks appended, and return the hidden states of both, ``[tokens, hidden]`` each.

    A block's prefix may hold tokens that this very forward computes: every layer writes the cache first. The blocks'
    own keys and values are not written. No CUDA graph is replayed, because none has room for the blocks.

    Args:
        draft_pass: of the engine.
        forward: vLLM's, called with ids, positions and ``others``, inside vLLM's forward context.
        blocks: at least one.
        rows: of each block's request in the batch.
        input_ids: int32 ``[tokens]``, of the causal forward, padding included.
        positions: int64 ``[tokens]``.
        others: more arguments of ``forward``.
    """
    tokens, added = len(input_ids), sum(block.length for block in blocks)
    padding = rounded_size(tokens + added, draft_pass.max_tokens) - tokens - added
    draft_pass.locate(rows, blocks)
    ids = [token for block in blocks for token in block.tokens]
    places = [block.prefix + index for block in blocks for index in range(block.length)]

    def extended(causal: Tensor, values: list[int]) -> Tensor:
        more = torch.tensor(values + values[-1:] * padding, dtype=causal.dtype)
        return torch.cat((causal, more.to(causal.device)))

    context = get_forward_context()
    before = context.attn_metadata, context.slot_mapping, context.cudagraph_runtime_mode
    branches = draft_pass.metadata(blocks)
    adapted = _shifted(branches, tokens)
    assert isinstance(context.attn_metadata, dict), "one batch is not split into several"
    assert isinstance(context.slot_mapping, dict), "one batch is not split into several"
    known = {id(causal): BranchedMetadata(causal, tokens, branches, adapted) for causal in before[0].values()}
    context.attn_metadata = {name: known[id(causal)] for name, causal in before[0].items()}
    context.slot_mapping = {name: _unwritten(slots, tokens, added + padding) for name, slots in before[1].items()}
    context.cudagraph_runtime_mode = CUDAGraphMode.NONE
    try:
        hidden = forward(input_ids=extended(input_ids, ids), positions=extended(positions, places), **others)
    finally:
        context.attn_metadata, context.slot_mapping, context.cudagraph_runtime_mode = before
    return hidden[:tokens], hidden[tokens : tokens + added]


def _shifted(branches: DraftMetadata, tokens: int) -> Tensor | None:
    """Return the adapted tokens of blocks that come after ``tokens`` others."""
    if branches.adapted is None:
        return None
    count = branches.tokens
    assert count is not None, "a draft pass counts its tokens"
    own = torch.arange(count, device=branches.prefix_lens.device)
    return own[branches.adapted] + tokens


def _unwritten(slots: Tensor, tokens: int, added: int) -> Tensor:
    """Return slots of the cache for ``tokens`` and as many after them that are not written."""
    return torch.cat((slots[:tokens], slots.new_full((added,), -1)))
