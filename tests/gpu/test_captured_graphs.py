"""Graph-safe implementations, captured in a CUDA graph, at the released models' head size."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.kernels import cases
from vllm_nld.ops import IMPLEMENTATIONS, Implementation

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
GRAPH_SAFE = [one for one in IMPLEMENTATIONS if one.graph_safe]


@pytest.mark.parametrize("name", ["both masks", "one long row", "whole pages"])
@pytest.mark.parametrize("implementation", GRAPH_SAFE, ids=lambda one: one.name)
def test_captured_graph_follows_the_lengths(implementation: Implementation, name: str) -> None:
    """Captured once, replayed with other prefix lengths: the grid depends only on padded sizes."""
    reason = implementation.unavailable(torch.device("cuda"))
    if reason:
        pytest.skip(f"{implementation.name}: {reason}")
    spec = dataclasses.replace(cases.EDGE_SPECS[name], head_dim=128)
    call = cases.attention_arguments(spec, torch.bfloat16, "cuda")
    expected, used = cases.oracle(call), int(call.block_starts[-1])
    lengths = call.prefix_lens.clone()
    call.prefix_lens.zero_()
    implementation.block_attention(call)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        implementation.block_attention(call)
    call.prefix_lens.copy_(lengths)
    graph.replay()
    torch.testing.assert_close(call.output[:used].double().cpu(), expected[:used], atol=2e-2, rtol=2e-2)
