"""The draft adapter: a low-rank change of every layer's ``o_proj`` that only draft passes of self-speculation apply."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from vllm_nld.checkpoints.draft_lora import CONFIG_FILE, WEIGHTS_FILE, tensor_names
from vllm_nld.config import NemotronLabsDiffusionConfig


@dataclass
class DraftAdapter:
    """The term that ``o_proj`` gains in each layer: ``scale * B A x``.

    Attributes:
        a: per layer ``[rank, heads * head_dim]``.
        b: per layer ``[hidden, rank]``.
        scale: alpha / rank.
    """

    a: list[Tensor]
    b: list[Tensor]
    scale: float

    @classmethod
    def fresh(
        cls, config: NemotronLabsDiffusionConfig, rank: int, alpha: float, generator: torch.Generator
    ) -> DraftAdapter:
        """Return an untrained float32 adapter, which changes nothing yet: A uniform as in PEFT, B zero."""
        width, layers = config.num_attention_heads * config.head_dim, range(config.num_hidden_layers)
        bound = width**-0.5
        a = [(2 * torch.rand(rank, width, generator=generator) - 1) * bound for _ in layers]
        return cls(a, [torch.zeros(config.hidden_size, rank) for _ in layers], alpha / rank)

    @property
    def parameters(self) -> list[Tensor]:
        """All matrices, A of every layer before B."""
        return [*self.a, *self.b]

    def delta(self, layer: int, x: Tensor) -> Tensor:
        """Return the term that ``o_proj`` of ``layer`` gains for its input ``x`` ``[..., heads * head_dim]``, in its
        dtype."""
        low = x.to(self.a[layer].dtype) @ self.a[layer].T
        return (self.scale * (low @ self.b[layer].T)).to(x.dtype)

    def to(self, device: str | torch.device) -> DraftAdapter:
        """Return the adapter on another device."""
        return DraftAdapter([x.to(device) for x in self.a], [x.to(device) for x in self.b], self.scale)

    @classmethod
    def read(cls, folder: str | Path) -> DraftAdapter:
        """Read what :meth:`write` wrote. For the dense reference, which does not check its files."""
        config = json.loads((Path(folder) / CONFIG_FILE).read_text())
        tensors = load_file(Path(folder) / WEIGHTS_FILE)
        layers = range(len(tensors) // 2)
        a, b = ([tensors[tensor_names(layer)[matrix]].float() for layer in layers] for matrix in (0, 1))
        return cls(a, b, config["lora_alpha"] / config["r"])

    def write(self, folder: str | Path, base_model: str, dtype: torch.dtype = torch.float32) -> None:
        """Write PEFT's ``adapter_config.json`` and ``adapter_model.safetensors``, in the layout of the releases."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        rank = self.a[0].shape[0]
        alpha = self.scale * rank
        content = {
            "base_model_name_or_path": base_model,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "lora_dropout": 0.0,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": rank,
            "target_modules": ["o_proj"],
            "task_type": None,
            "use_dora": False,
            "use_rslora": False,
        }
        tensors = {
            tensor_names(layer)[matrix]: tensor.detach().to("cpu", dtype).contiguous()
            for matrix, tensors in ((0, self.a), (1, self.b))
            for layer, tensor in enumerate(tensors)
        }
        # save_file would make a file that only its owner can read.
        (folder / WEIGHTS_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))
        (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")
