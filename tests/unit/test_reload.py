"""vLLM's reload of weights keeps the draft adapter, which is not one of the checkpoint's tensors."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from vllm_nld.model.draft_adapter import DraftAdapter


def test_reload_keeps_the_adapter_and_reports_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    reload = pytest.importorskip("vllm.model_executor.model_loader.reload.layerwise")
    model = nn.ModuleList([DraftAdapter(2, 6, 4)])
    reload.record_metadata_for_reloading(model)
    down, up = model[0].down.normal_(), model[0].up.normal_()
    expected = down.clone(), up.clone()
    reload.logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING):
            reload.initialize_layerwise_reload(model)
            reload.finalize_layerwise_processing(model, None)
    finally:
        reload.logger.removeHandler(caplog.handler)
    assert not caplog.records
    assert torch.equal(model[0].down, expected[0])
    assert torch.equal(model[0].up, expected[1])
    assert model[0].down is down, "compiled graphs hold this tensor"
