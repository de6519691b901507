"""The reference itself, in float64, compared with attention written out slot by slot; the other tests rely on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.kernels import cases
from vllm_nld.ops import torch_ops


def visible(arguments: dict[str, Any], row: int, token: int, length: int) -> list[int]:
    """Fresh tokens of its block that a query sees, from the words of ``docs/operators.md``."""
    kind = int(arguments["mask_kinds"][row])
    if kind == 0:
        return list(range(length))
    if kind == 1:
        return list(range(token + 1))
    words = arguments["mask_words"][int(arguments["block_starts"][row]) + token].tolist()
    return [32 * w + b for w, word in enumerate(words) for b in range(32) if word & (1 << b) and 32 * w + b < length]


def naive(arguments: dict[str, Any]) -> Tensor:
    """One query and head at a time."""
    query, key, value = (arguments[name].double() for name in ("query", "key", "value"))
    key_pages, value_pages = arguments["key_pages"], arguments["value_pages"]
    size, group = key_pages.shape[2], query.shape[1] // key.shape[1]
    out = torch.full(query.shape, torch.nan, dtype=torch.float64)
    starts = arguments["block_starts"].tolist()
    for row, cached in enumerate(arguments["prefix_lens"].tolist()):
        slots = [(int(arguments["block_table"][row, i // size]), i % size) for i in range(cached)]
        for token in range(starts[row + 1] - starts[row]):
            fresh = [starts[row] + j for j in visible(arguments, row, token, starts[row + 1] - starts[row])]
            for head in range(query.shape[1]):
                kv = head // group
                keys = [key_pages[page, kv, place].double() * arguments["k_scale"] for page, place in slots]
                values = [value_pages[page, kv, place].double() * arguments["v_scale"] for page, place in slots]
                keys, values = keys + [key[j, kv] for j in fresh], values + [value[j, kv] for j in fresh]
                total = torch.zeros(query.shape[2], dtype=torch.float64)
                if keys:
                    scores = torch.stack(keys) @ query[starts[row] + token, head] * arguments["scale"]
                    total = scores.softmax(0) @ torch.stack(values)
                out[starts[row] + token, head] = total
    return out


SMALL = {
    "row-major": cases.AttentionSpec((17, 0, 3), (3, 5, 0), (0, 1, 2), heads=(2, 2), head_dim=32, layout=3, padding=2),
    "columns": cases.AttentionSpec(
        (33, 40), (3, 5), (2, 1), heads=(3, 1), head_dim=32, layout=0, shared=True, loose=True
    ),
    "float8": cases.AttentionSpec(
        (18, 5), (2, 4), (0, 2), head_dim=32, layout=2, cache=torch.float8_e4m3fn, fused=True
    ),
    "words": cases.AttentionSpec((0, 2), (35, 3), (2, 2), heads=(1, 1), head_dim=32, seed=1),
    "quadratic": cases.AttentionSpec((4, 2), (36, 9), (2, 2), heads=(1, 1), head_dim=32, quadratic=True, scale=2.0),
}


@pytest.mark.parametrize("name", SMALL)
def test_reference_equals_attention_slot_by_slot(name: str) -> None:
    arguments = cases.attention_arguments(SMALL[name], torch.float32)
    torch.testing.assert_close(cases.oracle(arguments), naive(arguments), equal_nan=True, atol=1e-12, rtol=1e-12)


def test_quadratic_mask() -> None:
    """k = 2: three drafts, then groups of two mask tokens after 1, 2 and 3 of them."""
    expected = """
        1 0 0 0 0 0 0 0 0
        1 1 0 0 0 0 0 0 0
        1 1 1 0 0 0 0 0 0
        1 0 0 1 1 0 0 0 0
        1 0 0 1 1 0 0 0 0
        1 1 0 0 0 1 1 0 0
        1 1 0 0 0 1 1 0 0
        1 1 1 0 0 0 0 1 1
        1 1 1 0 0 0 0 1 1
    """
    wanted = torch.tensor([[bit == "1" for bit in line.split()] for line in expected.split("\n") if line.strip()])
    assert torch.equal(cases.quadratic_mask(9), wanted)


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


@pytest.mark.parametrize("with_normaliser", [True, False])
@pytest.mark.parametrize(("rows", "vocab"), [(300, 20_000), (3, 1_500_000)])
def test_best_tokens_takes_little_memory(rows: int, vocab: int, with_normaliser: bool) -> None:
    """A few rows at a time become float32: at least one, at most 4 MiB."""
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0)).bfloat16()
    with LargestResult() as largest:
        tokens, best, normaliser = torch_ops.best_tokens(logits, with_normaliser)
    assert largest.bytes <= max(4 << 20, 4 * vocab)
    assert torch.equal(tokens, logits.argmax(-1))
    assert torch.equal(best, logits.amax(-1).float())
    if with_normaliser:
        torch.testing.assert_close(normaliser, logits.float().logsumexp(-1))
