"""The learned sampler of block diffusion: a small Transformer that predicts which of a block's top-1 tokens are right.

NLD paper, section 3.2 and Appendix A: per position a feature vector of 144 numbers (the predicted token's embedding,
compressed by PCA to 128, and 16 statistics of the predicted distribution) goes through 4 Transformer layers, and a
sigmoid gives the probability that the token is right. It reads logits alone, no hidden states. Which 16 statistics,
the paper's summaries say in part only; the list here is our own, and holds nothing that depends on earlier forwards.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vllm_nld.errors import NLDError
from vllm_nld.reference.model import rotate

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
STATISTICS = 16
# Beyond it a probability counts as certain; it keeps log-odds finite where float32 rounds a probability to 1.
_MOST_NATS = 12.0


class SamplerConfig(BaseModel):
    """Sizes of the network; the defaults are the paper's (4.8 M parameters)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    vocab_size: int = Field(ge=2)
    d_model: int = Field(default=384, ge=2)
    layers: int = Field(default=4, ge=1)
    heads: int = Field(default=6, ge=1)
    ffn_width: int = Field(default=768, ge=1)
    pca_dims: int = Field(default=128, ge=1)
    statistics: Literal[16] = STATISTICS

    def model_post_init(self, context: object, /) -> None:
        """Refuse a width that the heads cannot share; rotary positions need an even head size."""
        if self.d_model % (2 * self.heads):
            raise ValueError(f"d_model={self.d_model} is no multiple of 2 * heads={2 * self.heads}")


class Layer(nn.Module):
    """One pre-norm Transformer layer that attends to the whole block."""

    def __init__(self, config: SamplerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_norm, self.ffn_norm = nn.LayerNorm(config.d_model), nn.LayerNorm(config.d_model)
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)
        self.up = nn.Linear(config.d_model, config.ffn_width)
        self.down = nn.Linear(config.ffn_width, config.d_model)

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor) -> Tensor:
        """Transform float ``[rows, L, d_model]``; ``mask`` is bool ``[rows, 1, 1, L]``, True means "may attend"."""
        rows, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key = rotate(qkv[0], angles), rotate(qkv[1], angles)
        mixed = F.scaled_dot_product_attention(query, key, qkv[2], attn_mask=mask)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        y: Tensor = x + self.down(F.gelu(self.up(self.ffn_norm(x))))
        return y


class LearnedSampler(nn.Module):
    """Predicts, per masked position of a block, the probability that the current top-1 token is right.

    "Right" means: the token that serial denoising of the same block (one position per forward, the most confident
    first) ends up with.
    """

    token_features: Tensor
    """Float32 ``[vocab_size, pca_dims]``: the language model's token embedding, PCA-projected. It is stored with the
    weights, so that the sampler needs nothing of the language model."""

    def __init__(self, config: SamplerConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("token_features", torch.zeros(config.vocab_size, config.pca_dims))
        self.inlet = nn.Linear(config.pca_dims + config.statistics, config.d_model)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.d_model)
        self.head = nn.Linear(config.d_model, 1)

    @classmethod
    def load(cls, folder: Path) -> LearnedSampler:
        """Return the sampler of ``folder`` (``config.json`` and ``model.safetensors``), in evaluation mode.

        Raises:
            NLDError: a file is missing or unreadable, or config and weights do not fit each other.
        """
        config_file, weights_file = folder / CONFIG_FILE, folder / WEIGHTS_FILE
        for file in (config_file, weights_file):
            if not file.is_file():
                raise NLDError(f"learned sampler: {folder} holds no {file.name}")
        try:
            config = SamplerConfig.model_validate(json.loads(config_file.read_text(encoding="utf-8")))
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, item['loc'])) or 'config'}: {item['msg']}" for item in error.errors()]
            raise NLDError(f"learned sampler: {config_file}: {'; '.join(problems)}") from None
        except ValueError as error:
            raise NLDError(f"learned sampler: {config_file} is no JSON: {error}") from None
        try:
            tensors = load_file(weights_file)
        except (SafetensorError, OSError) as error:
            raise NLDError(f"learned sampler: {weights_file} is unreadable: {error}") from None
        sampler = cls(config)
        sampler._check(tensors, weights_file)
        sampler.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        return sampler.eval()

    def _check(self, tensors: dict[str, Tensor], file: Path) -> None:
        expected = {name: list(tensor.shape) for name, tensor in self.state_dict().items()}
        problems = [f"lacks {name}" for name in expected.keys() - tensors.keys()]
        problems += [f"has an unexpected {name}" for name in tensors.keys() - expected.keys()]
        problems += [
            f"has {name} of shape {list(tensors[name].shape)}, but {CONFIG_FILE} says {shape}"
            for name, shape in expected.items()
            if name in tensors and list(tensors[name].shape) != shape
        ]
        if problems:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise NLDError(f"learned sampler: {file} {'; '.join(sorted(problems)[:3])}{more}")

    def save(self, folder: Path) -> None:
        """Write config and weights: float32, the token features in float16."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        tensors["token_features"] = tensors["token_features"].half()
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / CONFIG_FILE).write_text(self.config.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @torch.inference_mode()
    def correctness(self, logits: Tensor, blocks: Tensor, masked: Tensor, present: Tensor | None = None) -> Tensor:
        """Return the probability that the top-1 token is right, float32 ``[rows, L]``; 0 where nothing is masked.

        Args:
            logits: float32 ``[rows, L, vocab]``, row i predicting position i, the mask token at minus infinity. Only
                the rows of masked positions are read.
            blocks: int64 ``[rows, L]``, the block's ids; the committed positions' are read.
            masked: bool ``[rows, L]``, the undecided positions.
            present: bool ``[rows, L]``, False for the padding behind the end of a shorter block; None: no padding.

        Raises:
            NLDError: the sampler was made for another vocabulary.
        """
        if logits.shape[-1] != self.config.vocab_size:
            raise NLDError(
                f"learned sampler: made for a vocabulary of {self.config.vocab_size} tokens, "
                f"but the model's has {logits.shape[-1]}"
            )
        present = torch.ones_like(masked) if present is None else present
        masked = masked & present
        tokens, statistics = block_features(logits, blocks, masked, present)
        return self(tokens, statistics, present).sigmoid().masked_fill(~masked, 0.0)

    def forward(self, tokens: Tensor, statistics: Tensor, present: Tensor) -> Tensor:
        """Return log-odds of being right, float32 ``[rows, L]``, from what :func:`block_features` gives."""
        x = self.inlet(torch.cat((self.token_features[tokens], statistics), dim=-1))
        half = self.config.d_model // self.config.heads // 2
        # Neighbours matter most; rotary angles show distances at any block length, without a table that has an end.
        frequencies = 64.0 ** -(torch.arange(half, device=x.device) / half)
        angles = torch.arange(tokens.shape[1], device=x.device)[:, None] * frequencies
        for layer in self.layers:
            x = layer(x, angles, present[:, None, None])
        odds: Tensor = self.head(self.norm(x))
        return odds.squeeze(-1)


def block_features(logits: Tensor, blocks: Tensor, masked: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the network sees: token ids int64 ``[rows, L]`` and statistics float32 ``[rows, L, 16]``.

    A masked position shows its top-1 token, a committed one its own, with the statistics of certainty. All arguments
    are as in :meth:`LearnedSampler.correctness`.
    """
    # Padding shows token 0: nothing attends to it, but it must be a valid index.
    tokens = blocks.masked_fill(~present, 0)
    shape = (*masked.shape, 8)
    certain = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, _MOST_NATS, _MOST_NATS, 0.0], device=logits.device)
    certain[5:7] /= 4
    distribution = certain.expand(shape).clone()
    # Only masked rows are looked at: the others may hold anything, and a softmax over a real vocabulary is not free.
    rows = logits[masked].float()
    tokens[masked] = rows.argmax(-1)
    distribution[masked] = _distribution_statistics(rows)
    return tokens, torch.cat((distribution, _place_statistics(distribution[..., 0], tokens, masked, present)), dim=-1)


def _distribution_statistics(rows: Tensor) -> Tensor:
    """Describe each distribution of ``rows`` (logits ``[n, vocab]``), float32 ``[n, 8]``."""
    log_probabilities = rows.log_softmax(-1)
    top = log_probabilities.topk(min(5, rows.shape[-1]), dim=-1).values
    p = F.pad(top.exp(), (0, 5 - top.shape[-1]))
    others = (1 - p[:, 0]).clamp_min(math.exp(-_MOST_NATS))
    entropy = torch.special.entr(log_probabilities.exp()).sum(-1)
    columns = (
        p[:, 0],
        p[:, 0] - p[:, 1],
        p[:, :3].sum(-1),
        p.sum(-1),
        entropy / math.log(rows.shape[-1]),
        (top[:, 0] - others.log()).clamp(-_MOST_NATS, _MOST_NATS) / 4,
        (top[:, 0] - top[:, 1]).clamp_max(_MOST_NATS) / 4,
        p[:, 1],
    )
    return torch.stack(columns, dim=-1)


def _place_statistics(top: Tensor, tokens: Tensor, masked: Tensor, present: Tensor) -> Tensor:
    """Describe each position's place in its block, float32 ``[rows, L, 8]``; ``top`` are top-1 probabilities."""
    length = masked.shape[1]
    count = present.sum(1, keepdim=True)
    index = torch.arange(length, device=masked.device).expand_as(tokens)
    open_count = masked.sum(1, keepdim=True)
    decided = present & ~masked
    left = torch.where(decided, index, -1).cummax(1).values
    right = torch.where(decided, index, 2 * length).flip(1).cummin(1).values.flip(1)
    # How many masked positions are surer than this one: the samplers compare positions with each other.
    rivals = (masked[:, None, :] & (top[:, None, :] > top[:, :, None])).sum(-1)
    repeats = F.pad(tokens[:, 1:] == tokens[:, :-1], (1, 0))
    columns = (
        masked.float(),
        index / count,
        index / 32,
        open_count / count,
        (index - left) / 16,
        # A block has no decided position to the right as often as not: one value for all of these.
        torch.where(right < length, (right - index) / 16, 2.0),
        rivals / open_count.clamp_min(1),
        repeats.float(),
    )
    return torch.stack([column.expand_as(top).to(torch.float32) for column in columns], dim=-1)
