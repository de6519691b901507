"""Quantized copies of a checkpoint, under the names and in the shapes that the usual tools write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32
Packer = Callable[[Tensor], dict[str, Tensor]]


def w4a16(weight: Tensor) -> dict[str, Tensor]:
    """compressed-tensors ``pack-quantized``: symmetric int4, a scale per group of inputs, eight to an int32."""
    rows, columns = weight.shape
    grouped = weight.view(rows, columns // GROUP, GROUP)
    scale = grouped.abs().amax(-1, keepdim=True) / 7
    values = ((grouped / scale).round().clamp(-8, 7).to(torch.int64) + 8).view(rows, columns // 8, 8)
    packed = (values << torch.arange(0, 32, 4)).sum(-1)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
    shape = torch.tensor([rows, columns])
    return {"weight_packed": packed, "weight_scale": scale.squeeze(-1).to(torch.bfloat16), "weight_shape": shape}


def gptq(weight: Tensor) -> dict[str, Tensor]:
    rows, columns = weight.shape
    groups = columns // GROUP
    return {
        "qweight": torch.zeros(columns // 8, rows, dtype=torch.int32),
        "qzeros": torch.zeros(groups, rows // 8, dtype=torch.int32),
        "scales": torch.zeros(groups, rows, dtype=torch.float16),
        "g_idx": torch.zeros(columns, dtype=torch.int32),
    }


def awq(weight: Tensor) -> dict[str, Tensor]:
    rows, columns = weight.shape
    groups = columns // GROUP
    return {
        "qweight": torch.zeros(columns, rows // 8, dtype=torch.int32),
        "qzeros": torch.zeros(groups, rows // 8, dtype=torch.int32),
        "scales": torch.zeros(groups, rows, dtype=torch.float16),
    }


def nvfp4(weight: Tensor) -> dict[str, Tensor]:
    rows, columns = weight.shape
    return {
        "weight_packed": torch.zeros(rows, columns // 2, dtype=torch.uint8),
        "weight_scale": torch.zeros(rows, columns // 16, dtype=torch.uint8),
        "weight_global_scale": torch.ones(1),
    }


def modelopt_fp4(weight: Tensor) -> dict[str, Tensor]:
    rows, columns = weight.shape
    return {
        "weight": torch.zeros(rows, columns // 2, dtype=torch.uint8),
        "weight_scale": torch.zeros(rows, columns // 16, dtype=torch.uint8),
        "weight_scale_2": torch.ones(1),
        "input_scale": torch.ones(1),
    }


def _compressed(**weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
    }


W4A16 = _compressed(num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP, dynamic=False)
FORMATS: dict[str, tuple[Packer, dict[str, Any]]] = {
    "w4a16": (w4a16, W4A16),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
    "nvfp4": (
        nvfp4,
        _compressed(num_bits=4, type="float", symmetric=True, strategy="tensor_group", group_size=16)
        | {"format": "nvfp4-pack-quantized"},
    ),
    "modelopt": (modelopt_fp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
}


def quantize(folder: Path, target: Path, kind: str, **config: Any) -> Path:
    """Write a copy whose layers' matrices are packed; only ``w4a16`` has weights; the others have headers."""
    pack, settings = FORMATS[kind]
    tensors: dict[str, Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if ".layers." in name and weight.ndim == 2:
            stem = name.removesuffix("weight")
            tensors |= {stem + part: value.contiguous() for part, value in pack(weight.float()).items()}
        else:
            tensors[name] = weight
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    whole = json.loads((folder / "config.json").read_text())
    whole["quantization_config"] = settings | config
    (target / "config.json").write_text(json.dumps(whole))
    return target


HEAD_AND_EMBEDDING = ("diffusion_head", "encoder.embed_tokens")


def compress(folder: Path, target: Path, scheme: str, ignore: Iterable[str] = HEAD_AND_EMBEDDING) -> Path:
    """Write a copy in one of the schemes of compressed-tensors, by it, as llm-compressor's ``model_free_ptq`` would.

    Groups have 32 inputs, not 128, which a small model may not have.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    how = preset_name_to_scheme(scheme, ["Linear"])
    if how.weights.group_size and how.weights.group_size > GROUP:
        how.weights.group_size = GROUP
    how.format = infer_module_format(torch.nn.Linear, how).value
    compressor = BaseCompressor.get_value_from_registry(how.format)
    tensors: dict[str, Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if weight.ndim != 2 or module in ignore:
            tensors[name] = weight
            continue
        scale, zero = _weight_scales(weight, how.weights)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        with torch.compiler.set_stance("force_eager"):  # it would compile its packing of FP4 for ten seconds
            packed = compressor.compress(state, how)
        tensors |= {f"{module}.{part}": value.contiguous() for part, value in packed.items()}
    shutil.copytree(folder, target)
    save_file(tensors, target / "model.safetensors")
    config = QuantizationConfig(
        config_groups={scheme: how},
        ignore=list(ignore),
        format=how.format,
        quantization_status=QuantizationStatus.COMPRESSED,
    )
    whole = json.loads((folder / "config.json").read_text())
    whole["quantization_config"] = config.model_dump(mode="json")
    (target / "config.json").write_text(json.dumps(whole))
    return target


def _weight_scales(weight: Tensor, args: Any) -> tuple[Tensor, Tensor]:
    """Return the scale and zero point of each channel, group or block of a weight ``[outputs, inputs]``."""
    from compressed_tensors.quantization.utils import calculate_qparams

    rows, columns = weight.shape
    high, wide = args.block_structure or (1, args.group_size or columns)
    padded = torch.nn.functional.pad(weight, (0, -columns % wide, 0, -rows % high))
    parts = padded.unflatten(1, (-1, wide)).unflatten(0, (-1, high))  # [rows, high, columns, wide]
    scale, zero = calculate_qparams(parts.amin((1, 3)), parts.amax((1, 3)), args)
    return scale, zero
