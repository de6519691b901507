"""A draft pass is padded to few sizes; results of the padding must not reach the tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_nld.attention import backend
from vllm_nld.attention.backend import DraftMetadata, block_forward


@pytest.mark.parametrize("tokens", [3, 5])
def test_attention_of_padding_is_zero(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Its memory holds old values, and a quantization with one scale for a whole tensor reads all of it."""

    def attend(*arguments: Any) -> None:
        output: Tensor = arguments[-1]
        output[:tokens] = 1.0

    pages = torch.zeros(1, 2, 16, 8)
    layout = SimpleNamespace(split=lambda cache, head_dim: (pages, pages))
    monkeypatch.setattr(backend, "page_layout", lambda layer: layout)
    monkeypatch.setattr(backend.ops, "function", lambda *_: attend)
    none = torch.zeros(0, dtype=torch.int32)
    starts = torch.tensor([0, tokens], dtype=torch.int32)
    blocks = DraftMetadata(none, none, starts, none, tokens, 0, tokens=tokens)
    layer = SimpleNamespace(head_size=8, kv_cache=pages)
    query, key = torch.zeros(5, 4, 8), torch.zeros(5, 2, 8)
    output = block_forward(layer, 1.0, query, key, key, blocks, torch.full((5, 4, 8), torch.nan))
    assert output[:tokens].eq(1).all()
    assert output[tokens:].eq(0).all()
