"""How weights may be stored: bytes, and the units that multiply by them.

Embedding, output layer, norms and what reads images stay wide in every file that ``vllm-nld quantize`` writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_nld.errors import NLDError


@dataclass(frozen=True)
class WeightFormat:
    """A format of the layers' matrices.

    Attributes:
        bytes: per weight, scales included.
        units: type that is multiplied, a key of :attr:`vllm_nld.planning.gpus.Gpu.flops`; weights alone that are
            quantized are widened first.
        wide: type of activations, embedding and output layer.
    """

    bytes: float
    units: str
    wide: str = "bfloat16"


FORMATS = {
    "bfloat16": WeightFormat(2, "bfloat16"),
    "float16": WeightFormat(2, "float16", "float16"),
    "float32": WeightFormat(4, "float32", "float32"),
    "fp8": WeightFormat(1, "fp8"),
    "mxfp8": WeightFormat(1 + 1 / 32, "fp8"),
    "w8a8": WeightFormat(1, "int8"),
    "w8a16": WeightFormat(1, "bfloat16"),
    "w4a8": WeightFormat(0.5 + 2 / 128, "int8"),
    "w4a16": WeightFormat(0.5 + 2 / 128, "bfloat16"),
    "nvfp4a16": WeightFormat(0.5 + 1 / 16, "bfloat16"),
    "mxfp4a16": WeightFormat(0.5 + 1 / 32, "bfloat16"),
}
"""Values of ``--dtype``. Groups of 128 have a scale of 2 bytes, NVFP4's of 16 and MX formats' of 32 one of 1 byte."""


def weight_format(quantization: dict[str, Any] | None) -> str:
    """Return the name of the format that a config's ``quantization_config`` describes; None: there is none.

    Raises:
        NLDError: it is quantized in a way that is not in :data:`FORMATS`.
    """
    if quantization is None:
        return "bfloat16"
    method, groups = str(quantization.get("quant_method")), quantization.get("config_groups")
    name = f"{method}, {quantization.get('bits')} bits"
    if isinstance(groups, dict) and groups:
        weights, inputs = (next(iter(groups.values())).get(part) or {} for part in ("weights", "input_activations"))
        key = (weights.get("type"), weights.get("num_bits"), bool(inputs))
        found = _COMPRESSED.get(key)
        if key[:2] == ("float", 4) and not inputs:
            found = "nvfp4a16" if weights.get("group_size") == 16 else "mxfp4a16"
        if found == "fp8" and weights.get("group_size") == 32:
            found = "mxfp8"
        name = f"{method}, {key[0]}{key[1]} weights"
    else:
        found = {"fp8": "fp8", "gptq": "w4a16", "awq": "w4a16"}.get(method)
        if quantization.get("bits", 4) != 4:
            found = None
    if found is None:
        raise NLDError(f"config.json: quantization_config ({name}) is none that plan knows; give --dtype: "
                       + ", ".join(FORMATS))  # fmt: skip
    return found


_COMPRESSED: dict[tuple[Any, Any, bool], str] = {
    ("int", 8, True): "w8a8",
    ("int", 8, False): "w8a16",
    ("int", 4, True): "w4a8",
    ("int", 4, False): "w4a16",
    ("float", 8, True): "fp8",
}
"""compressed-tensors: (type and bits of weights, whether activations are quantized) -> name."""
