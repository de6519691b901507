"""Running what serving will run, once, while no request waits: kernels are compiled at their first call.

Triton has one kernel per dtype and layout of the tensors, and per size of its tiles. That leaves few: they depend on
the model, on the length of the longest block, and on whether a prefix can be long enough to be split. From the end of
vLLM's own warm-up on, its JIT monitor takes every compilation for a mistake.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from vllm_nld.attention.backend import DraftMetadata, block_forward
from vllm_nld.draft_pass.block import Block
from vllm_nld.model.best_tokens import best_tokens
from vllm_nld.ops.arguments import BIDIRECTIONAL
from vllm_nld.vllm_glue.greedy_verify import verify_greedily

if TYPE_CHECKING:
    from vllm_nld.draft_pass.forward import DraftPass


@torch.inference_mode()
def warm_up(draft_pass: DraftPass, block_length: int) -> None:
    """Call the operators as draft passes and verifications will. The KV cache is read, and not written.

    With tensor parallelism all ranks must call this.

    Args:
        draft_pass: of an engine whose KV cache is bound and whose page layout is found.
        block_length: tokens of the longest block.
    """
    for layer in _different(draft_pass.layers.values()):
        for length in lengths(block_length):
            for prefix in (0, draft_pass.last_position):
                _attend(layer, length, prefix, draft_pass.vllm_config.model_config.dtype, draft_pass.device)
    _decide(draft_pass)


def lengths(block_length: int) -> list[int]:
    """Return block lengths of which every tile size occurs that a block up to ``block_length`` can have.

    Tile sizes are powers of two and grow with the length, so one length per doubling has them all.
    """
    shorter = [1 << power for power in range(block_length.bit_length()) if 1 << power < block_length]
    return [*shorter, block_length]


def _different(layers: Iterable[Any]) -> list[Any]:
    """Return one layer of each kind of KV cache; some layers' may be of another dtype."""
    by_kind = {(layer.kv_cache.dtype, layer.kv_cache.shape, layer.kv_cache.stride()): layer for layer in layers}
    return list(by_kind.values())


def _attend(layer: Any, length: int, longest_prefix: int, dtype: torch.dtype, device: torch.device) -> None:
    """Attend inside one block after a cached token, which stands for a prefix of up to ``longest_prefix`` tokens."""

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    cached = min(1, longest_prefix)
    metadata = DraftMetadata(
        torch.zeros(1, cached, dtype=torch.int32, device=device),
        ints(cached),
        ints(0, length),
        ints(BIDIRECTIONAL),
        max_length=length,
        max_prefix=longest_prefix,
        kind=BIDIRECTIONAL,
    )
    query = torch.zeros(length, layer.num_heads * layer.head_size, dtype=dtype, device=device)
    key = torch.zeros(length, layer.num_kv_heads * layer.head_size, dtype=dtype, device=device)
    block_forward(layer, layer.head_size**-0.5, query, key, key, metadata, torch.empty_like(query))


def _decide(draft_pass: DraftPass) -> None:
    """Take the best tokens of two rows, as a draft pass does; then verify one draft of one request greedily."""
    model, device = draft_pass.model, draft_pass.device
    config = draft_pass.vllm_config.model_config
    hidden = torch.zeros(2, config.get_hidden_size(), dtype=config.dtype, device=device)
    if draft_pass.activate_tasks is not None:  # with LoRAs the head wants to know of whom its rows are
        draft_pass.activate_tasks([Block(0, [draft_pass.mask_token_id] * 2)], 2, 2)
    best_tokens(model, hidden)
    logits = model.compute_logits(hidden)
    one_draft = SimpleNamespace(
        cu_num_draft_tokens=torch.ones(1, dtype=torch.int32, device=device),
        draft_token_ids=torch.zeros(1, dtype=torch.int32, device=device),
        target_logits_indices=torch.zeros(1, dtype=torch.int32, device=device),
        bonus_logits_indices=torch.ones(1, dtype=torch.int32, device=device),
        max_spec_len=1,
    )
    if logits is not None:  # on a rank that gathers them
        verify_greedily(one_draft, logits)


@contextmanager
def compilations_allowed() -> Iterator[None]:
    """Keep vLLM's JIT monitor quiet: our warm-up goes on where vLLM's is over.

    The monitor is a hook of Triton's, which knows no reason; in its mode "error" a compilation would end the worker.
    """
    try:
        from triton import knobs
    except ImportError:  # no Triton, or one that is older than its hooks
        yield
        return
    hook = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = None
    try:
        yield
    finally:
        knobs.runtime.jit_post_compile_hook = hook
