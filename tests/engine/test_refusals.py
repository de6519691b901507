"""Engine options under which self-speculation would be wrong are refused by name, before any weight loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm import EngineArgs
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

from tests.support.models import random_model, save, small_config
from vllm_nld.attention.backend import _with_draft_passes
from vllm_nld.errors import NLDError, find
from vllm_nld.vllm_glue import workers

SPEC = {"model": "vllm_nld.SelfSpeculation"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model(small_config(num_key_value_heads=1)), tmp_path_factory.mktemp("model"))


def arguments(folder: Path, **settings: Any) -> EngineArgs:
    settings = {"speculative_config": SPEC, "max_model_len": 256} | settings
    return EngineArgs(model=str(folder), skip_tokenizer_init=True, **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"tensor_parallel_size": 4, "decode_context_parallel_size": 2},
            ["decode_context_parallel_size=2", "tensor_parallel_size"],
        ),
        ({"prefill_context_parallel_size": 2}, ["prefill_context_parallel_size=2", "tensor_parallel_size"]),
        (
            {"speculative_config": SPEC | {"rejection_sample_method": "block"}},
            ["rejection_sample_method='block'", "'standard'"],
        ),
        (
            {
                "speculative_config": SPEC
                | {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": [0.5] * 7}
            },
            ["rejection_sample_method='synthetic'", "'standard'"],
        ),
        (
            {"kv_transfer_config": KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")},
            ["kv_connector='ExampleConnector'", "layer by layer"],
        ),
        (
            {
                "kv_transfer_config": KVTransferConfig(
                    kv_connector="MultiConnector",
                    kv_role="kv_both",
                    kv_connector_extra_config={
                        "connectors": [
                            {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"},
                            {"kv_connector": "ExampleConnector", "kv_role": "kv_both"},
                        ]
                    },
                )
            },
            ["kv_connector='MultiConnector'", "layer by layer"],
        ),
        ({"enable_dbo": True}, ["enable_dbo=True", "allowed: False"]),
        ({"ubatch_size": 2}, ["ubatch_size=2", "allowed: 0 or 1"]),
        ({"runner": "pooling"}, ["runner='pooling'", "'generate'", "speculative"]),
    ],
)
def test_unsuitable_arguments_are_refused(folder: Path, settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(Exception) as caught:  # whatever vLLM wraps it in
        arguments(folder, **settings).create_engine_config()
    error = find(caught.value)
    assert isinstance(error, NLDError), caught.value
    for word in words:
        assert word in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("connector", ["OffloadingConnector", "SimpleCPUOffloadConnector", "DecodeBenchConnector"])
def test_connectors_with_empty_layer_hooks_are_allowed(connector: str) -> None:
    assert not workers.transfers_layer_by_layer(KVTransferConfig(kv_connector=connector, kv_role="kv_both"))


@pytest.mark.parametrize("layerwise", [False, True])
def test_connector_can_declare_that_it_works_layer_by_layer(layerwise: bool) -> None:
    settings = {"use_layerwise": layerwise}
    config = KVTransferConfig(kv_connector="LMCacheConnectorV1", kv_role="kv_both", kv_connector_extra_config=settings)
    assert workers.transfers_layer_by_layer(config) == layerwise


class WaitingConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """A user's own connector."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do something."""
        self.waited = layer_name


def test_custom_connector_is_checked() -> None:
    config = KVTransferConfig(kv_connector="WaitingConnector", kv_connector_module_path=__name__, kv_role="kv_both")
    assert workers.transfers_layer_by_layer(config)


def test_attention_accepts_no_fused_operation() -> None:
    """A draft pass could not run it, because its attention neither quantizes its output nor writes rotated keys."""
    own = _with_draft_passes(TritonAttentionBackend).get_impl_cls()
    vllms = own.__mro__[1]
    asked = [name for name in dir(vllms) if name.startswith("fused_") and name.endswith("_supported")]
    assert "fused_output_quant_supported" in asked
    impl = object.__new__(own)
    for name in asked:
        assert name in vars(own), name
        assert getattr(impl, name)(*(["fp8"] if "quant" in name else [])) is False
