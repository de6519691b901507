"""The CUDA operators on a GPU, on the batches that ``tests/kernels/test_cuda_build.py`` runs emulated.

Needs ``libnld_cuda.so`` (``scripts/build_cuda.sh``). Never run so far, because no GPU was available.
"""

from __future__ import annotations

import pytest
import torch

from tests.kernels import cases, cuda_cases
from vllm_nld.ops import cuda_ops

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not cuda_ops.library_path().exists(), reason="needs libnld_cuda.so: scripts/build_cuda.sh"),
]


@pytest.mark.parametrize("name", cuda_cases.BATCHES)
def test_attention(name: str) -> None:
    cuda_cases.check(cuda_ops, cuda_cases.BATCHES[name], "cuda")


@pytest.mark.parametrize("seed", range(100))
def test_random_attention(seed: int) -> None:
    cuda_cases.check(cuda_ops, cuda_cases.random_batch(seed), "cuda")


@pytest.mark.parametrize("rows", [1, 31, 1024, 1025, 4000])
def test_accept_prefix(rows: int) -> None:
    cuda_cases.check_accept(cuda_ops, rows, rows, "cuda")


@pytest.mark.parametrize("name", cases.BEST_SPECS)
def test_best_tokens(name: str) -> None:
    cases.check_best(cuda_ops, cases.BEST_SPECS[name], "cuda")


def test_best_tokens_of_unaligned_rows() -> None:
    cases.check_best_anywhere(cuda_ops, "cuda")
    cases.check_best_alone(cuda_ops, "cuda")
