"""The learned sampler: a small Transformer that predicts which of a block's most probable tokens are safe to commit.

After the paper's section 3.2 and appendix A: per position the predicted token's embedding, compressed to 128
dimensions by PCA, and 16 statistics of the distribution; a few encoder layers over the block; sigmoids. It sees no
hidden states of the language model. The paper embeds the three most probable tokens and has fewer statistics.

It predicts more than whether the token is right, since that does not decide what a commit costs: a token that serial
denoising would choose later can still, committed now, change what comes after it, and a wrong token spoils a whole
block when it comes early and one token when it comes last.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vllm_nld.errors import NLDError

STATISTICS = 16
TOP = 5
WRONG_COST = 1 / 3
"""The share of a block that a wrong commit costs on average: what makes a score 0."""
LOG_ODDS = TOP + 3
"""Column of the statistics with the log-odds of the most probable token, divided by 10."""


class LearnedSamplerConfig(BaseModel):
    """Sizes of the network; the defaults are the paper's, which with the neighbours make 5.2 million parameters."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vocab_size: int = Field(ge=1)
    token_dims: int = Field(default=128, ge=1)
    d_model: int = Field(default=384, ge=1)
    layers: int = Field(default=4, ge=1)
    heads: int = Field(default=6, ge=1)
    feed_forward: int = Field(default=768, ge=1)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)


@dataclass(frozen=True)
class Forecast:
    """What the network says of each position, logits float32 ``[rows, length]``.

    Attributes:
        right: the most probable token is the one that serial denoising from here ends with.
        kept_if_right: the share of the block's tokens that stay what serial denoising would make them if the token is
            right and is committed now.
        kept_if_wrong: the same if it is wrong.
    """

    right: Tensor
    kept_if_right: Tensor
    kept_if_wrong: Tensor

    def score(self) -> Tensor:
        """Return 1 for a commit that is expected to change nothing, 0 for one as bad as a wrong one or worse."""
        right = self.right.sigmoid()
        lost = right * (-self.kept_if_right).sigmoid() + (1 - right) * (-self.kept_if_wrong).sigmoid()
        return (1 - lost / WRONG_COST).clamp_min(0.0)


class LearnedSampler(nn.Module):
    """Predicts what it costs to commit a masked position's most probable token now.

    Attributes:
        token_features: ``[vocab, token_dims]``, the compressed embedding; stored with the weights, so that nothing of
            the language model is needed.
    """

    token_features: Tensor

    def __init__(self, config: LearnedSamplerConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("token_features", torch.zeros(config.vocab_size, config.token_dims))
        self.inputs = nn.Linear(config.token_dims + STATISTICS, config.d_model)
        # The nearest neighbors say most; attention by itself is slow to find them.
        self.neighbours = nn.Conv1d(config.d_model, config.d_model, kernel_size=3, padding=1)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                config.d_model,
                config.heads,
                config.feed_forward,
                dropout=config.dropout,
                batch_first=True,
                norm_first=True,
            )
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.d_model)
        self.head = nn.Linear(config.d_model, 3)
        # An untrained network says what the language model says of itself; training learns where that is wrong.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.trust = nn.Parameter(torch.tensor(10.0))
        self.kept = nn.Parameter(torch.tensor([12.0, math.log(1 / WRONG_COST - 1)]))

    def forward(self, tokens: Tensor, statistics: Tensor, present: Tensor) -> Forecast:
        """Return the forecast for each position.

        Args:
            tokens: int64 ``[rows, length]``, the predicted token, or the committed one.
            statistics: float32 ``[rows, length, STATISTICS]``, see :func:`statistics`.
            present: bool ``[rows, length]``, False past the end of a shorter block.
        """
        x = self.inputs(torch.cat((self.token_features[tokens].float(), statistics), dim=-1))
        x = (x + place_encoding(x)) * present[..., None]
        x = x + self.neighbours(x.transpose(1, 2)).transpose(1, 2)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=~present)
        right, kept_if_right, kept_if_wrong = self.head(self.norm(x)).unbind(-1)
        trust = self.trust * statistics[..., LOG_ODDS]
        return Forecast(right + trust, kept_if_right + self.kept[0], kept_if_wrong + self.kept[1])

    @torch.inference_mode()
    def scores(self, logits: Tensor, blocks: Tensor, masked: Tensor, present: Tensor | None = None) -> Tensor:
        """Return how safe it is to commit each masked position's argmax, float32 ``[rows, length]``; 0 elsewhere.

        Args:
            logits: float32 ``[rows, length, vocab]`` of a bidirectional pass; read at masked positions only.
            blocks: int64 ``[rows, length]``, the current tokens.
            masked: bool ``[rows, length]``.
            present: bool ``[rows, length]``, False past the end of a shorter block; None: every position is there.
        """
        present = torch.ones_like(masked) if present is None else present
        tokens = torch.where(masked, logits.argmax(-1), blocks)
        predicted: Forecast = self(tokens, statistics(logits, masked, present), present)
        return predicted.score() * masked

    @classmethod
    def load(cls, folder: Path) -> LearnedSampler:
        """Load ``config.json`` and ``model.safetensors`` from a checkpoint's folder ``learned_sampler``.

        Raises:
            NLDError: a file is missing, or they do not fit each other.
        """
        try:
            config = LearnedSamplerConfig.model_validate(json.loads((folder / "config.json").read_text()))
            sampler = cls(config)
            sampler.load_state_dict(
                {key: value.float() for key, value in load_file(folder / "model.safetensors").items()}
            )
        except (OSError, ValueError, ValidationError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise NLDError(f"learned sampler in {folder} cannot be loaded: {reason}") from None
        return sampler.eval()

    def save(self, folder: Path) -> None:
        """Write what :meth:`load` reads, in float16."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(self.config.model_dump_json(indent=2) + "\n")
        save_file(
            {key: value.half().contiguous() for key, value in self.state_dict().items()}, folder / "model.safetensors"
        )


def statistics(logits: Tensor, masked: Tensor, present: Tensor) -> Tensor:
    """Return float32 ``[rows, length, STATISTICS]``: what the distributions and the block's state say.

    Everything is a function of the block's current state; nothing depends on other rows or on padding.
    """
    rows, length = masked.shape
    probabilities = torch.where(masked[..., None], logits.float(), 0.0).softmax(-1) * masked[..., None]
    top = probabilities.topk(TOP, dim=-1).values
    first = top[..., :1]
    entropy = torch.special.entr(probabilities).sum(-1, keepdim=True)
    log_odds = torch.logit(first, eps=1e-6) / 10 * masked[..., None]
    place = torch.arange(length, device=logits.device).expand(rows, -1)
    committed = present & ~masked
    left, right = _distances(committed, place)
    share = masked.sum(1, keepdim=True) / present.sum(1, keepdim=True)
    score = first.squeeze(-1).masked_fill(~masked, -1.0)
    rank = (score[:, None, :] > score[:, :, None]).sum(-1) / masked.sum(1, keepdim=True).clamp_min(1) * masked
    columns = (
        top,
        first - top[..., 1:2],
        top[..., :3].sum(-1, keepdim=True),
        entropy,
        log_odds,
        place[..., None] / 32,
        share[..., None].expand(rows, length, 1),
        committed[..., None],
        left[..., None],
        right[..., None],
        rank[..., None],
        (left[..., None] == 1 / 8) & masked[..., None],
    )
    return torch.cat([column.float() for column in columns], dim=-1)


def place_encoding(like: Tensor) -> Tensor:
    """Return sines and cosines of the place in the block, ``[length, dims]`` for ``like`` ``[rows, length, dims]``."""
    length, dims = like.shape[1:]
    places = torch.arange(length, device=like.device, dtype=torch.float32)[:, None]
    periods = torch.exp(torch.arange((dims + 1) // 2, device=like.device) * (-math.log(256.0) / ((dims + 1) // 2)))
    angles = places * periods
    return torch.cat((angles.sin(), angles.cos()), dim=-1)[:, :dims].to(like.dtype)


def _distances(committed: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far the nearest committed position is to the left and to the right, in eighths, at most 1."""
    far = place.shape[1] + 8
    last = torch.where(committed, place, -far).cummax(1).values
    next_ = torch.where(committed, place, 2 * far).flip(1).cummin(1).values.flip(1)
    return ((place - last) / 8).clamp(max=1), ((next_ - place) / 8).clamp(max=1)
