"""Random adapters in PEFT's layout: the draft adapter, and LoRAs that requests bring."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vllm_nld.checkpoints.draft_lora import CONFIG_FILE, WEIGHTS_FILE
from vllm_nld.config import NemotronLabsDiffusionConfig
from vllm_nld.reference import DraftAdapter


def random_adapter(config: NemotronLabsDiffusionConfig, rank: int = 4, seed: int = 0) -> DraftAdapter:
    """An adapter large enough to change what a random model drafts."""
    generator = torch.Generator().manual_seed(seed)
    adapter = DraftAdapter.fresh(config, rank, 2.0 * rank, generator)
    adapter.b = [torch.randn(b.shape, generator=generator) * 0.5 for b in adapter.b]
    return adapter


def change_settings(folder: Path, **changes: Any) -> None:
    """Change entries of an adapter's configuration on disk."""
    file = folder / CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) drop tensors of an adapter on disk."""
    file = folder / WEIGHTS_FILE
    tensors = {name: tensor for name, tensor in (load_file(file) | changes).items() if tensor is not None}
    save_file(tensors, file)


def save_task_lora(folder: Path, config: NemotronLabsDiffusionConfig, seed: int, rank: int = 4) -> Path:
    """Write a LoRA on the query and output projections, as a request may bring one."""
    generator = torch.Generator().manual_seed(seed)
    queries = config.num_attention_heads * config.head_dim
    shapes = {"q_proj": (config.hidden_size, queries), "o_proj": (queries, config.hidden_size)}
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for name, (inputs, outputs) in shapes.items():
            stem = f"base_model.model.encoder.layers.{layer}.self_attn.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) * inputs**-0.5
            tensors[f"{stem}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) * 0.5
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS_FILE)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(shapes), "bias": "none"}
    (folder / CONFIG_FILE).write_text(json.dumps(settings))
    return folder
