"""Models of a released size with random weights, which is enough for timing."""

from __future__ import annotations

from typing import Any

from vllm_nld.checkpoints.quantize import IGNORED
from vllm_nld.cli.limits import MODEL_LENGTH
from vllm_nld.config import NemotronLabsDiffusionConfig
from vllm_nld.names import ARCHITECTURE
from vllm_nld.planning.models import RELEASED

DUMMY_SETTINGS: dict[str, Any] = {"dtype": "bfloat16", "load_format": "dummy", "max_model_len": MODEL_LENGTH}
"""Arguments of ``LLM`` for such a model."""


def dummy_config(name: str, layers: int | None = None, scheme: str | None = None) -> NemotronLabsDiffusionConfig:
    """Return the configuration of a released size, with at most ``layers`` layers.

    With a ``scheme`` of :data:`~vllm_nld.checkpoints.quantize.SCHEMES`, its layers are quantized.
    """
    shape = RELEASED[name].shape
    quantized: dict[str, Any] = {} if scheme is None else {"quantization_config": quantization_settings(scheme)}
    return NemotronLabsDiffusionConfig(
        architectures=[ARCHITECTURE],
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=min(layers or shape.layers, shape.layers),
        dtype="bfloat16",
        **quantized,
    )


def quantization_settings(scheme: str) -> dict[str, Any]:
    """Return what ``vllm-nld quantize`` would leave in ``config.json`` for a scheme."""
    import torch
    from compressed_tensors.compressors.format import infer_module_format  # type: ignore[import-untyped]
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus  # type: ignore[import-untyped]
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme  # type: ignore[import-untyped]

    how = preset_name_to_scheme(scheme, ["Linear"])
    how.format = infer_module_format(torch.nn.Linear, how).value
    config = QuantizationConfig(
        config_groups={scheme: how},
        ignore=IGNORED,
        format=how.format,
        quantization_status=QuantizationStatus.COMPRESSED,
    )
    settings: dict[str, Any] = config.model_dump(mode="json")
    return settings
