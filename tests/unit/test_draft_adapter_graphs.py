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
from vllm_nld.model.adapter_shares import Share
from vllm_nld.model.draft_adapter import DraftAdapter, MaskRow, leave_adapter_out_of_graphs

assert vllms_attention, "defines the operators that vLLM splits at"


def compiled(**settings: Any) -> CompilationConfig:
    """A configuration as set by the GPU platform."""
    config = CompilationConfig(mode=CompilationMode.VLLM_COMPILE, **settings)
    config.set_splitting_ops_for_v1(all2all_backend="allgather_reducescatter")
    return config


MASK = 3
SHARES = [Share("q_proj", range(8), range(4), 0), Share("v_proj", range(8), range(2), 6)]


class Layer(nn.Module):
    """An embedding and a packed linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.mask_row = MaskRow(8, MASK)
        self.project = nn.Linear(8, 8)
        self.adapter = DraftAdapter(2, SHARES)
        torch.manual_seed(0)
        for buffer in self.buffers():
            buffer.normal_()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        embedded = self.embed(ids)
        self.mask_row(ids, embedded)
        projected = self.project(embedded)
        self.adapter(embedded, projected)
        return projected * 2


IDS = torch.tensor([1, MASK, 2, MASK])


def drafting(monkeypatch: pytest.MonkeyPatch, adapted: Any) -> None:
    """Pretend that a forward is in progress: a draft that is adapted so, or (None) a causal one."""
    none = torch.zeros(0, dtype=torch.int32)
    metadata = None if adapted is None else {"layer": DraftMetadata(none, none, none, none, 3, 0, adapted=adapted)}
    monkeypatch.setattr(draft_adapter, "is_forward_context_available", lambda: True)
    monkeypatch.setattr(draft_adapter, "get_forward_context", lambda: SimpleNamespace(attn_metadata=metadata))


def graph_of(layer: nn.Module) -> torch.fx.GraphModule:
    """The graph that Dynamo gives to vLLM's backend."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad(), torch.compiler.set_stance("default"):
        torch.compile(layer, backend=keep, fullgraph=True)(IDS)
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
    drafting(monkeypatch, None)
    config = compiled(**settings)
    others = list(config.splitting_ops)
    assert others, "attention, at least"
    leave_adapter_out_of_graphs(config)
    leave_adapter_out_of_graphs(config)
    assert config.splitting_ops == [*others, "vllm_nld::add_draft_adapter", "vllm_nld::set_mask_row"]

    _, pieces = split_graph(graph_of(Layer()), config.splitting_ops)
    for operator in ("add_draft_adapter", "set_mask_row"):
        assert [piece.is_splitting_graph for piece in pieces if operator in piece.graph.code] == [True]
    assert len(pieces) == 5


def test_engine_without_graph_pieces_stays_without() -> None:
    """Then there are at most graphs of whole forwards, and only for causal passes."""
    config = compiled(splitting_ops=[], cudagraph_mode=CUDAGraphMode.FULL_DECODE_ONLY)
    leave_adapter_out_of_graphs(config)
    assert config.splitting_ops == []
    assert not config.cudagraph_mode.has_piecewise_cudagraphs()


def test_capture_with_an_active_adapter_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer()
    drafting(monkeypatch, slice(None))
    layer(IDS)
    monkeypatch.setattr(draft_adapter, "is_being_captured", lambda _: True)
    with pytest.raises(NLDError, match="captured"):
        layer(IDS)
    drafting(monkeypatch, None)
    layer(IDS)  # a causal pass is captured without it


@torch.no_grad()
def test_adapted_tokens_of_a_packed_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """All tokens, some, or none; other columns stay as they are."""
    layer = Layer()
    drafting(monkeypatch, None)
    plain = layer(IDS)
    embedded = torch.where((IDS == MASK)[:, None], layer.mask_row.row, layer.embed(IDS))
    (q, v), down = layer.adapter.up, layer.adapter.down
    expected = layer.project(embedded)
    expected[:, :4] += embedded @ down[:, :2] @ q
    expected[:, 6:] += embedded @ down[:, 2:] @ v
    drafting(monkeypatch, slice(None))
    torch.testing.assert_close(layer(IDS), expected * 2)
    drafting(monkeypatch, torch.tensor([0, 1]))
    found = layer(IDS)
    torch.testing.assert_close(found[:2], expected[:2] * 2)
    assert torch.equal(found[2:], plain[2:]), "neither the matrices nor the mask token's row"
    monkeypatch.setattr(draft_adapter, "is_forward_context_available", lambda: False)
    assert torch.equal(layer(IDS), plain), "embedded outside a forward"
