"""Models of a released size with random weights, which is enough for timing."""

from __future__ import annotations

from typing import Any

from vllm_nld.cli.limits import MODEL_LENGTH
from vllm_nld.config import NemotronLabsDiffusionConfig
from vllm_nld.names import ARCHITECTURE
from vllm_nld.planning.models import RELEASED

DUMMY_SETTINGS: dict[str, Any] = {"dtype": "bfloat16", "load_format": "dummy", "max_model_len": MODEL_LENGTH}
"""Arguments of ``LLM`` for such a model."""


def dummy_config(name: str, layers: int | None = None) -> NemotronLabsDiffusionConfig:
    """Return the configuration of a released size, with at most ``layers`` layers."""
    shape = RELEASED[name].shape
    return NemotronLabsDiffusionConfig(
        architectures=[ARCHITECTURE],
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=min(layers or shape.layers, shape.layers),
        dtype="bfloat16",
    )
