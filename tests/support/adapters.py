"""Random adapters in PEFT's layout: the draft adapter, and LoRAs that requests bring."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vllm_nld.checkpoints.draft_lora import CONFIG_FILE, RELEASED_TARGETS, WEIGHTS_FILE, projection_size, tensor_names
from vllm_nld.config import NemotronLabsDiffusionConfig
from vllm_nld.reference import DraftAdapter


def random_adapter(
    config: NemotronLabsDiffusionConfig,
    rank: int = 4,
    seed: int = 0,
    targets: tuple[str, ...] = RELEASED_TARGETS,
    mask_row: bool = False,
    size: float = 0.5,
) -> DraftAdapter:
    """An adapter large enough to change what a random model drafts; ``size`` is the deviation of B."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.randn(config.hidden_size, generator=generator) if mask_row else None
    adapter = DraftAdapter.fresh(config, rank, 2.0 * rank, generator, targets, row)
    adapter.b = {place: torch.randn(b.shape, generator=generator) * size for place, b in adapter.b.items()}
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
    """Write a LoRA on a projection of each kind, packed and not, as a request may bring one."""
    generator = torch.Generator().manual_seed(seed)
    targets = ["q_proj", "o_proj", "up_proj", "down_proj"]
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for target in targets:
            (inputs, outputs), (a, b) = projection_size(config, target), tensor_names(layer, target)
            tensors[a] = torch.randn(rank, inputs, generator=generator) * inputs**-0.5
            tensors[b] = torch.randn(outputs, rank, generator=generator) * 0.5
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS_FILE)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets, "bias": "none"}
    (folder / CONFIG_FILE).write_text(json.dumps(settings))
    return folder
