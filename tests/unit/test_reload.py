"""vLLM's reload of weights keeps the draft adapter, which is not one of the checkpoint's tensors."""

from __future__ import annotations

import unittest

import pytest
import torch
from torch import nn

from vllm_nld.model.adapter_shares import Share
from vllm_nld.model.draft_adapter import DraftAdapter, MaskRow


def test_reload_keeps_the_adapter_and_reports_no_failure() -> None:
    reload = pytest.importorskip("vllm.model_executor.model_loader.reload.layerwise")
    shares = [Share("k_proj", range(6), range(4), 0), Share("v_proj", range(6), range(4), 4)]
    model = nn.ModuleList([DraftAdapter(2, shares), MaskRow(6, 3)])
    reload.record_metadata_for_reloading(model)
    kept = [buffer.normal_() for buffer in model.buffers()]
    assert len(kept) == 4
    expected = [buffer.clone() for buffer in kept]
    with unittest.TestCase().assertNoLogs(reload.logger, "WARNING"):
        reload.initialize_layerwise_reload(model)
        reload.finalize_layerwise_processing(model, None)
    assert all(map(torch.equal, model.buffers(), expected))
    assert all(now is old for now, old in zip(model.buffers(), kept, strict=True)), "compiled graphs hold these"
