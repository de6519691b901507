"""The reference itself, in float64, compared with attention written out slot by slot; the other tests rely on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.kernels import cases
from vllm_nld.ops import CAUSAL, BlockAttention, torch_ops


def naive(call: BlockAttention) -> Tensor:
    """One query and head at a time."""
    query, key, value = (x.double() for x in (call.query, call.key, call.value))
    size, group = call.key_pages.shape[2], query.shape[1] // key.shape[1]
    out = torch.full(query.shape, torch.nan, dtype=torch.float64)
    starts = call.block_starts.tolist()
    for row, cached in enumerate(call.prefix_lens.tolist()):
        slots = [(int(call.block_table[row, i // size]), i % size) for i in range(cached)]
        for token in range(starts[row], starts[row + 1]):
            end = token + 1 if int(call.mask_kinds[row]) == CAUSAL else starts[row + 1]
            for head in range(query.shape[1]):
                kv = head // group
                k_scale = call.k_scale if call.k_scales is None else call.k_scales[kv]
                v_scale = call.v_scale if call.v_scales is None else call.v_scales[kv]
                keys = [call.key_pages[page, kv, place].double() * k_scale for page, place in slots]
                values = [call.value_pages[page, kv, place].double() * v_scale for page, place in slots]
                keys += [key[other, kv] for other in range(starts[row], end)]
                values += [value[other, kv] for other in range(starts[row], end)]
                scores = torch.stack(keys) @ query[token, head] * call.scale
                out[token, head] = scores.softmax(0) @ torch.stack(values)
    return out


SMALL = {
    "row-major": cases.AttentionSpec((17, 0, 3), (3, 5, 0), (0, 1, 0), heads=(2, 2), head_dim=32, layout=3, padding=2),
    "columns": cases.AttentionSpec(
        (33, 40), (3, 5), (0, 1), heads=(3, 1), head_dim=32, layout=0, shared=True, loose=True
    ),
    "float8": cases.AttentionSpec(
        (18, 5), (2, 4), (0, 1), head_dim=32, layout=2, cache=torch.float8_e4m3fn, fused=True
    ),
    "float8 by head": cases.AttentionSpec(
        (18, 5), (2, 4), (0, 1), (2, 3), head_dim=32, cache=torch.float8_e5m2, by_head=True
    ),
    "no prefix": cases.AttentionSpec((0, 2), (35, 3), (1, 0), heads=(1, 1), head_dim=32, scale=2.0, seed=1),
}


@pytest.mark.parametrize("name", SMALL)
def test_reference_equals_attention_slot_by_slot(name: str) -> None:
    call = cases.attention_arguments(SMALL[name], torch.float32)
    torch.testing.assert_close(cases.oracle(call), naive(call), equal_nan=True, atol=1e-12, rtol=1e-12)


class LargestResult(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
            self.bytes = max([self.bytes, *(x.numel() * x.element_size() for x in made)])
        return result


@pytest.mark.parametrize("with_normalizer", [True, False])
@pytest.mark.parametrize(("rows", "vocab"), [(300, 20_000), (3, 1_500_000)])
def test_best_tokens_takes_little_memory(rows: int, vocab: int, with_normalizer: bool) -> None:
    """A few rows at a time become float32: at least one, at most 4 MiB."""
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0)).bfloat16()
    with LargestResult() as largest:
        tokens, best, normalizer = torch_ops.best_tokens(logits, with_normalizer)
    assert largest.bytes <= max(4 << 20, 4 * vocab)
    assert torch.equal(tokens, logits.argmax(-1))
    assert torch.equal(best, logits.amax(-1).float())
    if with_normalizer:
        torch.testing.assert_close(normalizer, logits.float().logsumexp(-1))
