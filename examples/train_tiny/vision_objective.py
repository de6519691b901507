"""The loss of the tiny vision-language model: the dual stream [noisy answer | clean picture, question and answer].

The clean stream holds the picture and is causal, so that a noisy block sees it as a draft pass does: in the prefix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from objective import MIN_MASK_PROBABILITY, dual_stream_mask
from torch import Tensor

from vllm_nld.reference.vision_language import ReferenceVLM


@dataclass
class Pictures:
    """Pictures of one size with one question each, and their answers.

    Attributes:
        features: the embeddings of their cells, ``[pictures, cells, hidden]``.
        ids: int64 ``[pictures, length]``: prompt, answer, and its end token until all rows are equally long.
        weights: of the tokens in the AR loss, ``[vocab]``.
        start: position of the answer's first token, the same in all rows.
        end_token: ends an answer.
    """

    features: Tensor
    ids: Tensor
    weights: Tensor
    start: int
    end_token: int

    @property
    def ended(self) -> Tensor:
        """Whether the answer has ended before a position, bool ``[pictures, length]``."""
        ends = self.ids == self.end_token
        ends[:, : self.start] = False
        return (ends.cumsum(1) - ends.long()) > 0


def ar_loss(model: ReferenceVLM, batch: Pictures) -> Tensor:
    """Mean next-token cross-entropy of the answers, in nats a token."""
    length = batch.ids.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    embedded = model.embed_features(batch.ids, batch.features.flatten(0, 1))
    return _next_token_loss(model, model.hidden(batch.ids, torch.arange(length), mask, embedded=embedded), batch)


def joint_loss(model: ReferenceVLM, batch: Pictures, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mean losses (AR, diffusion), in nats a token.

    Half of the pictures get draft masks: all of a block but its first token, which drafts are given. In the others
    each token is masked with a probability t ~ U(0, 1), drawn for each picture. Every other batch has its blocks begin
    with the answer, as a request's first block does; the others at a random place, as later blocks do.
    """
    block_length, (rows, length) = model.config.block_size, batch.ids.shape
    shift = int(torch.randint(2 * block_length, (), generator=generator))
    first_block = batch.start + (shift if shift < block_length else 0)
    masked, probability = _draw_masks(rows, batch.start, length, first_block, block_length, generator)
    noisy_hidden, clean_hidden = dual_stream(model, batch, masked, first_block)
    logits = model.diffusion_head(noisy_hidden[masked]).float()
    losses = F.cross_entropy(logits, batch.ids[:, batch.start :][masked], reduction="none")
    # One row's many masks must not outweigh another's few: each counts by 1 / its probability.
    weights = (1 / probability.clamp(min=0.1)).expand_as(masked)[masked]
    diffusion = (losses * weights).sum() / masked.numel()
    return _next_token_loss(model, clean_hidden, batch), diffusion


def dual_stream(model: ReferenceVLM, batch: Pictures, masked: Tensor, first_block: int) -> tuple[Tensor, Tensor]:
    """Return hidden states of the noisy answers and of all that is clean, ``[pictures, tokens, hidden]``.

    Args:
        model: of which one forward runs.
        batch: the clean stream.
        masked: bool ``[pictures, length - start]``, which tokens of the answers the noisy stream hides.
        first_block: position at which a block begins.
    """
    length = batch.ids.shape[1]
    embedded = model.embed_features(batch.ids, batch.features.flatten(0, 1))
    noisy = torch.where(masked, model.config.mask_token_id, batch.ids[:, batch.start :])
    positions = torch.arange(length)
    hidden = model.hidden(
        torch.cat((noisy, batch.ids), dim=1),
        torch.cat((positions[batch.start :], positions)),
        dual_stream_mask(length, model.config.block_size, batch.ids.device, batch.start, first_block),
        embedded=torch.cat((model.embed(noisy), embedded), dim=1),
    )
    noisy_hidden, clean_hidden = hidden.split((length - batch.start, length), dim=1)
    return noisy_hidden, clean_hidden


def _draw_masks(
    rows: int, start: int, length: int, first_block: int, block_length: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return the masked positions, bool ``[rows, length - start]``, and each row's probability ``[rows, 1]``."""
    probability = torch.rand(rows, 1, generator=generator).clamp(min=MIN_MASK_PROBABILITY)
    masked = torch.rand(rows, length - start, generator=generator) < probability
    drafts = torch.rand(rows, 1, generator=generator) < 0.5
    given = (torch.arange(start, length) - first_block) % block_length == 0
    # A block that began before the answer has its first token in the prompt; the answer's own is the given one.
    given[0] = True
    return torch.where(drafts, ~given, masked), torch.where(drafts, 1.0, probability)


def _next_token_loss(model: ReferenceVLM, hidden: Tensor, batch: Pictures) -> Tensor:
    """Weighted mean over the answers with their end tokens, but not what is after them."""
    counted = ~batch.ended[:, batch.start :]
    logits = model.diffusion_head(hidden[:, batch.start - 1 : -1][counted]).float()
    return F.cross_entropy(logits, batch.ids[:, batch.start :][counted], batch.weights)
