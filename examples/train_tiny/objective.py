"""The joint objective L = L_AR + alpha * L_diffusion on the dual stream [noisy | clean].

One forward over 2L tokens yields both losses: the clean half is strictly causal, so it is an ordinary language
model; a noisy block sees itself in full and the clean text of strictly earlier blocks, as a draft pass does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_nld.reference.model import ReferenceModel

MIN_MASK_PROBABILITY = 1e-3


@dataclass
class Batch:
    """One global batch; the mask is drawn for all of it at once so that losses can be averaged over all of it.

    Attributes:
        ids: int64 ``[sequences, length]``, clean tokens.
        masked: bool ``[sequences, length]``, which tokens the noisy half hides.
        probability: float32 ``[sequences, 1]``, each sequence's mask probability.
    """

    ids: Tensor
    masked: Tensor
    probability: Tensor

    @classmethod
    def draw(cls, ids: Tensor, generator: torch.Generator) -> Batch:
        """Draw t ~ U(0, 1) per sequence and mask each token with probability (1 - 1e-3) t + 1e-3."""
        t = torch.rand(ids.shape[0], 1, generator=generator)
        probability = (1 - MIN_MASK_PROBABILITY) * t + MIN_MASK_PROBABILITY
        masked = torch.rand(ids.shape, generator=generator) < probability
        return cls(ids, masked, probability)

    @classmethod
    def draw_drafts(cls, ids: Tensor, block_length: int) -> Batch:
        """Mask all of every block but its first token: the very input of a single-pass draft (t = 1, seed given)."""
        masked = (torch.arange(ids.shape[1]) % block_length != 0).expand_as(ids)
        return cls(ids, masked, torch.ones(ids.shape[0], 1))

    def global_count(self, joint: bool) -> int:
        """Denominator of the global average: AR tokens, plus masked tokens in the joint stage."""
        return self.ids.numel() + (int(self.masked.sum()) if joint else 0)

    def split(self, sequences: int) -> list[Batch]:
        """Cut into micro-batches of at most ``sequences``."""
        parts = zip(
            self.ids.split(sequences), self.masked.split(sequences), self.probability.split(sequences), strict=True
        )
        return [Batch(*part) for part in parts]


def dual_stream_mask(length: int, block_length: int, device: torch.device) -> Tensor:
    """Return the bool mask ``[2 length, 2 length]`` of ``sbd_block_diff``; rows and columns are [noisy | clean]."""
    position = torch.arange(length, device=device)
    block = position // block_length
    mask = torch.zeros(2 * length, 2 * length, dtype=torch.bool, device=device)
    mask[:length, :length] = block[:, None] == block[None, :]
    mask[:length, length:] = block[:, None] > block[None, :]
    mask[length:, length:] = position[:, None] >= position[None, :]
    return mask


def ar_loss_sum(model: ReferenceModel, ids: Tensor) -> Tensor:
    """Summed next-token cross-entropy, in nats."""
    length = ids.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
    hidden = model.hidden(ids, torch.arange(length, device=ids.device), mask)
    return _next_token_loss(model, hidden, ids)


def joint_loss_sum(model: ReferenceModel, batch: Batch, block_length: int) -> tuple[Tensor, Tensor]:
    """Summed (L_AR, L_diffusion), in nats; each masked token's loss is weighted by 1 / its mask probability."""
    ids, length = batch.ids, batch.ids.shape[1]
    noisy = torch.where(batch.masked, model.config.mask_token_id, ids)
    positions = torch.arange(length, device=ids.device).repeat(2)
    mask = dual_stream_mask(length, block_length, ids.device)
    hidden = model.hidden(torch.cat((noisy, ids), dim=1), positions, mask)
    noisy_hidden, clean_hidden = hidden.split(length, dim=1)
    logits = model.diffusion_head(noisy_hidden[batch.masked]).float()
    weights = (1 / batch.probability).expand_as(batch.masked)[batch.masked]
    diffusion = (F.cross_entropy(logits, ids[batch.masked], reduction="none") * weights).sum()
    return _next_token_loss(model, clean_hidden, ids), diffusion


def _next_token_loss(model: ReferenceModel, hidden: Tensor, ids: Tensor) -> Tensor:
    logits = model.diffusion_head(hidden[:, :-1]).float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
