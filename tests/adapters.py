"""Random adapters in PEFT's layout: the draft adapter, and LoRAs that requests bring."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vllm_nld.draft_lora import CONFIG_FILE, WEIGHTS_FILE, tensor_names


def adapter_settings(rank: int = 4, alpha: float = 8, **changes: Any) -> dict[str, Any]:
    """What the released adapters' configuration looks like."""
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": ["o_proj"],
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    return settings | changes


def adapter_tensors(config: Any, rank: int = 4, size: float = 0.5, seed: int = 0) -> dict[str, torch.Tensor]:
    """A and B of every layer, large enough to change what a model says."""
    generator = torch.Generator().manual_seed(seed)
    queries = config.num_attention_heads * config.head_dim
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(config.num_hidden_layers):
        down, up = tensor_names(layer)
        tensors[down] = torch.randn(rank, queries, generator=generator) * queries**-0.5
        tensors[up] = torch.randn(config.hidden_size, rank, generator=generator) * size
    return tensors


def save_adapter(folder: Path, settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(settings))
    save_file(tensors, folder / WEIGHTS_FILE)
    return folder
