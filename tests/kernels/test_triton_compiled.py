"""What Triton compiles for a GPU, checked without one: nothing while requests wait, and without errors."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch

from tests.kernels.implementations import INTERPRETING
from tests.kernels.triton_compiler import Compilation, pretended_gpu
from vllm_nld.ops import BlockAttention, triton_ops

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRETING, reason="this process interprets")

HEADS, KV_HEADS, HEAD_DIM, VOCAB = 8, 2, 64, 131072


@pytest.fixture
def compiled() -> Iterator[list[Compilation]]:
    with pretended_gpu() as log:
        yield log


def attend(rows: int, length: int, prefix: int, columns: int) -> None:
    """Call block_attention with a batch of ``rows`` equal rows; query, key and value lie in one tensor."""
    tokens = rows * length
    joined = torch.zeros(tokens, HEADS + 2 * KV_HEADS, HEAD_DIM, dtype=torch.bfloat16)
    query, key, value = joined.split([HEADS, KV_HEADS, KV_HEADS], 1)
    pages = torch.zeros(4, 2, 16, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16)
    lists = torch.zeros(3 * rows + 2, dtype=torch.int32)  # some do not begin at a multiple of 16 bytes
    call = BlockAttention(
        query, key, value, pages[:, 0].transpose(1, 2), pages[:, 1].transpose(1, 2),
        torch.zeros(rows, columns + 1, dtype=torch.int32)[:, 1:], lists[:rows], lists[rows : 2 * rows + 1],
        lists[2 * rows + 1 : 3 * rows + 1], 0.125, 1.0, 1.0, length, prefix, torch.empty_like(query),
    )  # fmt: skip
    triton_ops.block_attention(call)


def accept(rows: int, drafts: int) -> None:
    """Call accept_prefix with slices of larger tensors."""
    numbers = torch.zeros(1 + rows * (2 * drafts + 1), dtype=torch.int64)
    starts = torch.arange(0, (rows + 2) * drafts, drafts, dtype=torch.int32)[1:] - drafts
    triton_ops.accept_prefix(numbers[1 : 1 + rows * drafts], numbers[1 + rows * drafts :], starts)


def names(compiled: list[Compilation]) -> list[str]:
    return [compilation.kernel for compilation in compiled]


BATCHES: dict[str, list[tuple[int, ...]]] = {
    "one tile": [(1, 4, 0, 1), (2, 4, 17, 2), (16, 3, 100, 16), (33, 4, 500, 32)],
    "split prefixes": [(1, 16, 600, 38), (1, 15, 4096, 256), (4, 16, 5000, 313), (2, 9, 8000, 500)],
    "several tiles": [(1, 32, 0, 1), (1, 60, 0, 1), (2, 64, 10, 1), (16, 300, 0, 1)],
}


@pytest.mark.parametrize("name", BATCHES)
def test_batch_sizes_compile_no_new_attention_kernel(compiled: list[Compilation], name: str) -> None:
    """Rows, tiles, splits, and row strides of tables must not be compiled in."""
    first, *others = BATCHES[name]
    attend(*first)
    expected = ["attention_kernel", "merge_kernel"] if name == "split prefixes" else ["attention_kernel"]
    assert names(compiled) == expected
    for batch in others:
        attend(*batch)
    assert names(compiled) == expected


def test_batch_sizes_compile_no_new_kernel_of_other_operators(compiled: list[Compilation]) -> None:
    for rows, drafts in product((1, 2, 16, 33), (1, 5, 16)):
        accept(rows, drafts)
    assert names(compiled) == ["count_kernel", "pack_kernel"]
    for rows in (1, 2, 16, 33):
        triton_ops.best_tokens(torch.zeros(rows, VOCAB, dtype=torch.bfloat16))
    assert names(compiled)[2:] == ["best_kernel", "best_merge_kernel"]
    for rows in (1, 2, 16, 33):
        triton_ops.best_tokens(torch.zeros(rows, VOCAB, dtype=torch.bfloat16), with_normalizer=False)
    assert len(compiled) == 6, names(compiled)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile(capability: int) -> None:
    """Down to a binary for A100, H100 and B200; logits are loaded 16 bytes at a time."""
    with pretended_gpu(capability, compiling=True) as compiled:
        triton_ops.best_tokens(torch.zeros(2, VOCAB, dtype=torch.bfloat16))
        accept(2, 3)
        if capability == 90:  # takes long; the others have the same code
            attend(1, 4, 600, 38)
    assert all(compilation.binary.asm["cubin"] for compilation in compiled)
    assert "ld.global.v4.b32" in compiled[0].binary.asm["ptx"]
