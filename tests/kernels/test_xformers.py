"""The parts of the xformers implementation that can be checked without a GPU.

xformers' attention kernels do not run on CPU. Here a dense softmax replaces them, with the mask from xformers' own
biases, so that biases, page handling and merging are checked on the same batches as every other implementation. If
Triton is interpreted, xformers' real merge kernel runs. The attention kernels themselves run in ``test_operators.py``,
on CUDA.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels import cases
from tests.kernels.implementations import INTERPRETING
from vllm_nld.errors import NLDError
from vllm_nld.ops import xformers_ops
from vllm_nld.ops.implementation import HALF

pytest.importorskip("xformers")


def stand_in(query: Tensor, keys: Tensor, values: Tensor, bias: Any, scale: float) -> tuple[Tensor, Tensor]:
    """memory_efficient_attention_partial for grouped tensors ``[B, M, G, H, D]``, in float32."""
    assert query.shape[2:] == keys.shape[2:] == values.shape[2:]
    if hasattr(bias, "block_tables"):
        table = bias.block_tables
        assert table.dtype == torch.int32 and table.is_contiguous()
        assert keys.stride(1) == values.stride(1) or keys.shape[1] == 0
        slots = (table.long()[..., None] * bias.page_size + torch.arange(bias.page_size)).flatten()
        keys, values = keys[:, slots], values[:, slots]
        bias = bias._UNPAGED_TYPE(q_seqinfo=bias.q_seqinfo, k_seqinfo=bias.k_seqinfo)
    else:
        assert not (keys.isnan().any() or values.isnan().any()), "unused slots were copied as they were"
    if not isinstance(bias, Tensor):
        bias = bias.materialize((query.shape[1], keys.shape[1]))
    # A kernel does not load keys that no query sees.
    unseen = bias.isneginf().all(-2)
    unseen = unseen[:, 0, 0] if unseen.dim() > 1 else unseen[None]
    keys, values = (x.float().masked_fill(unseen[..., None, None, None], 0.0) for x in (keys, values))
    scores = torch.einsum("bqghd,bkghd->bghqk", query.float(), keys) * scale + bias.float()
    out = torch.einsum("bghqk,bkghd->bqghd", scores.softmax(-1), values).to(query.dtype)
    lse = scores.logsumexp(-1)
    return out, torch.nn.functional.pad(lse, (0, 5))  # some kernels pad their lse


def merge_in_torch(first: xformers_ops.Part, second: xformers_ops.Part) -> Tensor:
    weights = torch.stack((first.lse, second.lse)).softmax(0)[..., None]
    return weights[0] * first.output + weights[1] * second.output


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xformers_ops, "_partial", stand_in)
    if not INTERPRETING:
        monkeypatch.setattr(xformers_ops, "merge", merge_in_torch)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", [*cases.EDGE_SPECS, *cases.HEAD_SCALE_SPECS])
def test_edges(patched: None, dtype: torch.dtype, name: str) -> None:
    cases.check(xformers_ops, (cases.EDGE_SPECS | cases.HEAD_SCALE_SPECS)[name], dtype)


@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(spec=cases.attention_specs(longest_prefix=200), dtype=st.sampled_from(HALF))
def test_drawn(patched: None, spec: cases.AttentionSpec, dtype: torch.dtype) -> None:
    cases.check(xformers_ops, spec, dtype)


@pytest.mark.skipif(not INTERPRETING, reason="xformers merges with Triton; test_triton_interpreted.py runs this")
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_merge(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (
        xformers_ops.Part(torch.randn(5, 4, 32, generator=generator).to(dtype), torch.randn(5, 4, generator=generator))
        for _ in range(2)
    )
    second.lse[2], second.output[2] = -torch.inf, 0.0
    found = xformers_ops.merge(first, second)
    assert torch.equal(found[2], first.output[2])
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.float(), merge_in_torch(first, second), atol=tolerance, rtol=tolerance)


def test_pages_read_in_place() -> None:
    """The layout with all pages end to end is read in place, the others are copied."""
    layouts = [cases.empty_cache(index, 4, 2, 16, 32, torch.float16) for index in range(6)]
    assert [all(xformers_ops.in_place(pool, torch.float16) for pool in pools) for pools in layouts] == [
        False, False, False, True, False, False,
    ]  # fmt: skip
    assert not xformers_ops.in_place(layouts[3][0], torch.bfloat16)


def test_every_kernel_reports_why_it_cannot_run() -> None:
    """For real: xformers is asked, and refuses CPU tensors."""
    query = torch.zeros(1, 4, 2, 1, 64, dtype=torch.float16)
    bias = xformers_ops._biases().BlockDiagonalMask.from_seqlens([4], device=torch.device("cpu"))
    with pytest.raises(NLDError, match="choose another implementation") as caught:
        xformers_ops._partial(query, query, query, bias, 1.0)
    assert "fa2F" in str(caught.value) and "triton_splitKF" in str(caught.value)
    assert "device=cpu" in str(caught.value)


def test_split_k_steps_through_small_pages() -> None:
    assert [xformers_ops._operators(size)[1].BLOCK_N for size in (None, 128, 32, 16, 48)] == [64, 64, 32, 16, 16]


def test_reports_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "CUDA" in str(xformers_ops.unavailable(torch.device("cpu")))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))
    assert "8.0" in str(xformers_ops.unavailable(torch.device("cuda")))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    assert xformers_ops.unavailable(torch.device("cuda")) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "not installed" in str(xformers_ops.unavailable(torch.device("cuda")))
