"""Draft attention against a softmax written out per row and head."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vllm_nld.block_attention import block_attention


def naive(
    query: Tensor, key: Tensor, value: Tensor, prefix: tuple[Tensor, Tensor], mask: Tensor | None, scale: float
) -> Tensor:
    out = torch.zeros_like(query)
    group = query.shape[2] // key.shape[2]
    for row in range(query.shape[0]):
        for head in range(query.shape[2]):
            kv_head = head // group
            keys = torch.cat((prefix[0][row, kv_head], key[row, :, kv_head]))
            values = torch.cat((prefix[1][row, kv_head], value[row, :, kv_head]))
            scores = query[row, :, head] @ keys.T * scale
            if mask is not None:
                scores = scores.masked_fill(~mask[row, 0, 0], -torch.inf)
            out[row, :, head] = scores.softmax(-1) @ values
    return out


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 2), (8, 1)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("length", "prefix_length"), [(1, 3), (5, 7), (4, 0)])
def test_equals_naive_softmax(heads: int, kv_heads: int, masked: bool, length: int, prefix_length: int) -> None:
    generator = torch.Generator().manual_seed(heads * 100 + kv_heads)
    rows, head_dim = 3, 8

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    query = normal(rows, length, heads, head_dim)
    key, value = normal(rows, length, kv_heads, head_dim), normal(rows, length, kv_heads, head_dim)
    prefix = normal(rows, kv_heads, prefix_length, head_dim), normal(rows, kv_heads, prefix_length, head_dim)
    mask = None
    if masked:
        mask = torch.rand(rows, 1, 1, prefix_length + length, generator=generator) < 0.6
        mask[..., -1] = True
    found = block_attention(query, key, value, prefix, mask, 0.3)
    assert found.shape == query.shape
    torch.testing.assert_close(found, naive(query, key, value, prefix, mask, 0.3), atol=1e-5, rtol=1e-5)


def test_masked_keys_do_not_matter() -> None:
    """A row padded to a longer prefix and block gives what it gives alone."""
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, 3, 2, 4, generator=generator) for _ in range(3))
    prefix = torch.randn(1, 2, 5, 4, generator=generator), torch.randn(1, 2, 5, 4, generator=generator)
    alone = block_attention(query, key, value, prefix, None, 0.5)
    padded = tuple(torch.cat((part, torch.full((1, 2, 2, 4), 99.0)), dim=2) for part in prefix)
    mask = torch.tensor([True] * 5 + [False] * 2 + [True] * 3).view(1, 1, 1, 10)
    found = block_attention(query, key, value, (padded[0], padded[1]), mask, 0.5)
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)
