"""The vision part of the vision-language model, dense: Pixtral's tower, and Mistral 3's projector into the text model.

The tower sees the patches of one image, all of them at once. The projector merges cells of 2 x 2 patches, and each
cell becomes one embedding of the text model. Parameter names are the released ones after ``encoder.``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_nld.config import NemotronLabsDiffusionVLMConfig
from vllm_nld.reference.model import RMSNorm, rotate

_EPS = 1e-5
"""Of the tower's norms: no config has it."""


class VisionAttention(nn.Module):
    """Multi-head attention between all patches of an image; no biases."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        size = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        def split(projected: Tensor) -> Tensor:
            return projected.view(*projected.shape[:-1], self.heads, -1).transpose(1, 2)

        query, key = (rotate(split(project(x)), cos, sin) for project in (self.q_proj, self.k_proj))
        seen = F.scaled_dot_product_attention(query, key, split(self.v_proj(x)))
        out: Tensor = self.o_proj(seen.transpose(1, 2).flatten(2))
        return out


class VisionMLP(nn.Module):
    """SwiGLU feed-forward layer."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class VisionLayer(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, _EPS)
        self.attention = VisionAttention(config)
        self.ffn_norm = RMSNorm(config.hidden_size, _EPS)
        self.feed_forward = VisionMLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        out: Tensor = x + self.feed_forward(self.ffn_norm(x))
        return out


class VisionTransformer(nn.Module):
    """The tower's layers; there is no final norm."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))


class VisionTower(nn.Module):
    """Pixtral's vision transformer, for images of one size.

    Args:
        config: ``vision_config``, of ``model_type`` ``pixtral``.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.theta = float(config.rope_parameters["rope_theta"])
        patch = config.patch_size
        self.patch_conv = nn.Conv2d(config.num_channels, config.hidden_size, patch, stride=patch, bias=False)
        self.ln_pre = RMSNorm(config.hidden_size, _EPS)
        self.transformer = VisionTransformer(config)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return ``[images, rows, columns, hidden]``, a vector per patch.

        Args:
            pixels: normalized, ``[images, channels, height, width]``; whole patches in both directions.
        """
        patches: Tensor = self.patch_conv(pixels.to(self.patch_conv.weight.dtype))
        rows, columns = patches.shape[-2:]
        x: Tensor = self.ln_pre(patches.flatten(2).transpose(1, 2))
        angles = self._angles(rows, columns).to(x.device)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.transformer.layers:
            x = layer(x, cos, sin)
        return x.view(-1, rows, columns, x.shape[-1])

    def _angles(self, rows: int, columns: int) -> Tensor:
        """Return float32 ``[rows * columns, head_dim // 2]``: first those of a patch's row, then of its column.

        Every other frequency is for rows, the others are for columns.
        """
        frequencies = self.theta ** -(torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim)
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        by_row = row.flatten()[:, None] * frequencies[0::2]
        by_column = column.flatten()[:, None] * frequencies[1::2]
        return torch.cat((by_row, by_column), dim=-1).float()


class PatchMerger(nn.Module):
    """A learned merge of the patches of a cell, ``merge`` x ``merge``, into a vector of the same size."""

    def __init__(self, hidden: int, merge: int) -> None:
        super().__init__()
        self.merge = merge
        self.merging_layer = nn.Linear(hidden * merge**2, hidden, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        # unfold orders a cell's values by channel first, then by row and column.
        cells = F.unfold(patches.permute(0, 3, 1, 2), kernel_size=self.merge, stride=self.merge)
        out: Tensor = self.merging_layer(cells.transpose(1, 2))
        return out


class Projector(nn.Module):
    """From the tower's patches to embeddings of the text model.

    Args:
        config: of the vision-language model.
    """

    def __init__(self, config: NemotronLabsDiffusionVLMConfig) -> None:
        super().__init__()
        seen = config.vision_config.hidden_size
        self.norm = RMSNorm(seen, config.rms_norm_eps)
        self.patch_merger = PatchMerger(seen, config.spatial_merge_size)
        self.linear_1 = nn.Linear(seen, config.hidden_size, bias=False)
        self.linear_2 = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """Return ``[images, cells, text hidden]``, row by row, for ``[images, rows, columns, vision hidden]``."""
        out: Tensor = self.linear_2(F.gelu(self.linear_1(self.patch_merger(self.norm(patches)))))
        return out
