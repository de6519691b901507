"""No CUDA graph may contain the draft adapter, because a graph captured without it would be replayed without it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.compilation.backends import split_graph
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode
from vllm.model_executor.layers.attention import attention as vllms_attention

from vllm_nld.attention.backend import DraftMetadata
from vllm_nld.errors import NLDError
from vllm_nld.model import draft_adapter
from vllm_nld.model.draft_adapter import DraftAdapter, leave_adapter_out_of_graphs

assert vllms_attention, "defines the operators that vLLM splits at"


def compiled(**settings: Any) -> CompilationConfig:
    """A configuration as set by the GPU platform."""
    config = CompilationConfig(mode=CompilationMode.VLLM_COMPILE, **settings)
    config.set_splitting_ops_for_v1(all2all_backend="allgather_reducescatter")
    return config


class Layer(nn.Module):
    """The end of an attention layer."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)
        self.adapter = DraftAdapter(2, 8, 8)

    def forward(self, attended: torch.Tensor) -> torch.Tensor:
        projected = self.project(attended)
        self.adapter(attended, projected)
        return projected * 2


def graph_of(layer: nn.Module) -> torch.fx.GraphModule:
    """The graph that Dynamo gives to vLLM's backend."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        torch.compile(layer, backend=keep, fullgraph=True)(torch.zeros(3, 8))
    return graphs[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"cudagraph_mode": CUDAGraphMode.FULL_AND_PIECEWISE},
        {"cudagraph_mode": CUDAGraphMode.PIECEWISE},
        {"splitting_ops": ["vllm::unified_attention_with_output"]},
        {"use_inductor_graph_partition": True},
    ],
)
def test_graphs_are_cut_at_the_adapter(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    monkeypatch.setattr(draft_adapter, "get_forward_context", lambda: SimpleNamespace(attn_metadata=None))
    config = compiled(**settings)
    others = list(config.splitting_ops)
    assert others, "attention, at least"
    leave_adapter_out_of_graphs(config)
    leave_adapter_out_of_graphs(config)
    assert config.splitting_ops == [*others, "vllm_nld::add_draft_adapter"]

    _, pieces = split_graph(graph_of(Layer()), config.splitting_ops)
    with_adapter = [piece for piece in pieces if "add_draft_adapter" in piece.graph.code]
    assert [piece.is_splitting_graph for piece in with_adapter] == [True]
    assert len(pieces) == 3


def test_engine_without_graph_pieces_stays_without() -> None:
    """Then there are at most graphs of whole forwards, and only for causal passes."""
    config = compiled(splitting_ops=[], cudagraph_mode=CUDAGraphMode.FULL_DECODE_ONLY)
    leave_adapter_out_of_graphs(config)
    assert config.splitting_ops == []
    assert not config.cudagraph_mode.has_piecewise_cudagraphs()


def test_capture_with_an_active_adapter_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    none = torch.zeros(0, dtype=torch.int32)
    adapted = DraftMetadata(none, none, none, none, 3, 0, slice(None))
    context = SimpleNamespace(attn_metadata={"layer": adapted})
    monkeypatch.setattr(draft_adapter, "get_forward_context", lambda: context)
    layer = Layer()
    layer(torch.ones(3, 8))
    monkeypatch.setattr(draft_adapter, "is_being_captured", lambda _: True)
    with pytest.raises(NLDError, match="captured"):
        layer(torch.ones(3, 8))
    context.attn_metadata = None
    layer(torch.ones(3, 8))  # a causal pass is captured without it
