"""The draft adapter: a low-rank change of the layers' projections that only draft passes of self-speculation apply."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from vllm_nld.checkpoints.draft_lora import (
    CONFIG_FILE,
    MASK_ROW,
    RELEASED_TARGETS,
    TARGETS,
    WEIGHTS_FILE,
    in_order,
    projection_size,
    tensor_names,
)
from vllm_nld.config import NemotronLabsDiffusionConfig

Place = tuple[int, str]
"""A layer and one of its projections, such as ``(0, "o_proj")``."""

_A_NAME = re.compile(r"\.layers\.(\d+)\.\w+\.(\w+)\.lora_A\.weight$")


@dataclass
class DraftAdapter:
    """The terms that projections gain, ``scale * B A x`` at each place, and the mask token's own input row.

    Attributes:
        a: by place, ``[rank, inputs]``; layer by layer, each in the order of ``TARGETS``.
        b: by the same places, ``[outputs, rank]``.
        scale: alpha / rank.
        mask_row: ``[hidden]``, replaces the mask token's input row; None: the model's own counts.
        mask_token_id: of the model, if there is a mask row.
    """

    a: dict[Place, Tensor]
    b: dict[Place, Tensor]
    scale: float
    mask_row: Tensor | None = None
    mask_token_id: int | None = None

    @classmethod
    def fresh(
        cls,
        config: NemotronLabsDiffusionConfig,
        rank: int,
        alpha: float,
        generator: torch.Generator,
        targets: tuple[str, ...] = RELEASED_TARGETS,
        mask_row: Tensor | None = None,
    ) -> DraftAdapter:
        """Return an untrained float32 adapter, which changes nothing yet: A uniform as in PEFT, B zero.

        Args:
            config: of the model.
            rank: of every change.
            alpha: scale times rank.
            generator: of A.
            targets: the projections that are changed.
            mask_row: the model's own, ``[hidden]``, to start from; None: the adapter brings none.
        """
        a, b = dict[Place, Tensor](), dict[Place, Tensor]()
        for layer in range(config.num_hidden_layers):
            for target in in_order(targets):
                inputs, outputs = projection_size(config, target)
                a[layer, target] = _fresh_a(rank, inputs, generator)
                b[layer, target] = torch.zeros(outputs, rank)
        if mask_row is None:
            return cls(a, b, alpha / rank)
        return cls(a, b, alpha / rank, mask_row.detach().float().cpu().clone(), config.mask_token_id)

    @property
    def targets(self) -> tuple[str, ...]:
        """The projections that are changed."""
        return in_order(target for _, target in self.a)

    @property
    def parameters(self) -> list[Tensor]:
        """All that is trained: A of every place, then B, then the mask row."""
        return [*self.a.values(), *self.b.values(), *([] if self.mask_row is None else [self.mask_row])]

    def add(self, layer: int, target: str, x: Tensor, output: Tensor) -> Tensor:
        """Return a projection's ``output`` ``[..., outputs]`` for its input ``x`` ``[..., inputs]``, changed."""
        place = layer, target
        if place not in self.a:
            return output
        a, b = self.a[place], self.b[place]
        if a.dtype != output.dtype:
            return output + (self.scale * ((x.to(a.dtype) @ a.T) @ b.T)).to(output.dtype)
        low = x.flatten(0, -2) @ a.T
        return torch.addmm(output.flatten(0, -2), low, b.T, alpha=self.scale).view(output.shape)

    def embed(self, ids: Tensor, embedded: Tensor) -> Tensor:
        """Return the ``embedded`` ``[..., hidden]`` of token ``ids`` ``[...]``, with the mask token's own row."""
        if self.mask_row is None or self.mask_token_id is None:
            return embedded
        masked = torch.eq(ids, self.mask_token_id).unsqueeze(-1)
        return torch.where(masked, self.mask_row.to(embedded.dtype), embedded)

    def to(self, device: str | torch.device) -> DraftAdapter:
        """Return the adapter on another device."""
        a, b = ({place: x.to(device) for place, x in matrices.items()} for matrices in (self.a, self.b))
        row = None if self.mask_row is None else self.mask_row.to(device)
        return DraftAdapter(a, b, self.scale, row, self.mask_token_id)

    def rounded(self, dtype: torch.dtype) -> DraftAdapter:
        """Return the adapter in ``dtype``; gradients go to this one, in its own dtype."""
        a, b = ({place: x.to(dtype) for place, x in matrices.items()} for matrices in (self.a, self.b))
        row = None if self.mask_row is None else self.mask_row.to(dtype)
        return DraftAdapter(a, b, self.scale, row, self.mask_token_id)

    def widened(self, rank: int, generator: torch.Generator) -> DraftAdapter:
        """Return the same change in a form of higher rank: fresh rows of A meet zero columns of B. Alpha grows, too."""
        a = {
            place: torch.cat((old, _fresh_a(rank - len(old), old.shape[1], generator))) for place, old in self.a.items()
        }
        b = {place: torch.cat((old, old.new_zeros(len(old), rank - old.shape[1])), 1) for place, old in self.b.items()}
        return DraftAdapter(a, b, self.scale, self.mask_row, self.mask_token_id)

    @classmethod
    def read(cls, folder: str | Path) -> DraftAdapter:
        """Read what :meth:`write` wrote. For the dense reference, which does not check its files."""
        config = json.loads((Path(folder) / CONFIG_FILE).read_text())
        tensors = load_file(Path(folder) / WEIGHTS_FILE)
        named = [match.groups() for match in map(_A_NAME.search, tensors) if match]
        places = sorted(((int(layer), target) for layer, target in named), key=lambda p: (p[0], TARGETS.index(p[1])))
        a, b = ({place: tensors[tensor_names(*place)[matrix]].float() for place in places} for matrix in (0, 1))
        scale = config["lora_alpha"] / config["r"]
        if MASK_ROW not in tensors:
            return cls(a, b, scale)
        tokens = config["trainable_token_indices"]
        (mask_token_id,) = tokens["embed_tokens"] if isinstance(tokens, dict) else tokens
        return cls(a, b, scale, tensors[MASK_ROW][0].float(), mask_token_id)

    def write(self, folder: str | Path, base_model: str, dtype: torch.dtype = torch.float32) -> None:
        """Write PEFT's ``adapter_config.json`` and ``adapter_model.safetensors``, in the layout of the releases."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        named = {
            tensor_names(*place)[matrix]: tensor
            for matrix, tensors in ((0, self.a), (1, self.b))
            for place, tensor in tensors.items()
        }
        if self.mask_row is not None:
            named[MASK_ROW] = self.mask_row[None]
        tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in named.items()}
        # save_file would make a file that only its owner can read.
        (folder / WEIGHTS_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))
        (folder / CONFIG_FILE).write_text(json.dumps(self._settings(base_model), indent=2) + "\n")

    def _settings(self, base_model: str) -> dict[str, Any]:
        rank = next(iter(self.a.values())).shape[0]
        alpha = self.scale * rank
        settings = {
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
            "target_modules": list(self.targets),
            "task_type": None,
            "use_dora": False,
            "use_rslora": False,
        }
        if self.mask_row is not None:
            settings["trainable_token_indices"] = {"embed_tokens": [self.mask_token_id]}
        return settings


def _fresh_a(rank: int, inputs: int, generator: torch.Generator) -> Tensor:
    matrix: Tensor = (2 * torch.rand(rank, inputs, generator=generator) - 1) * inputs**-0.5
    return matrix
