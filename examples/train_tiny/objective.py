"""The losses of the three stages: only AR, AR + alpha * diffusion, drafts with an anchored AR.

Both diffusion losses come from one forward over the dual stream [noisy | clean]: the clean part is strictly causal, so
it is an ordinary language model; a noisy block attends to all of itself and to the clean text of strictly earlier
blocks, as in a draft pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_nld.reference.model import ReferenceModel

MIN_MASK_PROBABILITY = 1e-3
# A draft counts only if all drafts before it are right, so a block's early positions decide the acceptance length.
POSITION_DECAY = 0.85


@dataclass
class Batch:
    """One global batch. The mask is drawn for the whole batch, so that losses can be averaged over it.

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

    def global_count(self, joint: bool) -> int:
        """Denominator of the global average: AR tokens, plus masked tokens in the joint stage."""
        return self.ids.numel() + (int(self.masked.sum()) if joint else 0)

    def split(self, sequences: int) -> list[Batch]:
        """Cut into micro-batches of at most ``sequences``."""
        parts = zip(
            self.ids.split(sequences), self.masked.split(sequences), self.probability.split(sequences), strict=True
        )
        return [Batch(*part) for part in parts]


def dual_stream_mask(
    length: int, block_length: int, device: torch.device, start: int = 0, first_block: int = 0
) -> Tensor:
    """Return the bool mask of ``sbd_block_diff``; rows and columns are [noisy from ``start`` on | clean ``length``].

    Blocks begin at position ``first_block`` and at whole blocks before and after it.
    """
    clean = torch.arange(length, device=device)
    noisy = clean[start:]
    noisy_block, clean_block = ((stream - first_block) // block_length for stream in (noisy, clean))
    own_block = noisy_block[:, None] == noisy_block[None, :]
    earlier_blocks = noisy_block[:, None] > clean_block[None, :]
    never = torch.zeros(length, length - start, dtype=torch.bool, device=device)
    causal = clean[:, None] >= clean[None, :]
    return torch.cat((torch.cat((own_block, earlier_blocks), dim=1), torch.cat((never, causal), dim=1)))


def ar_loss_sum(model: ReferenceModel, ids: Tensor) -> Tensor:
    """Summed next-token cross-entropy, in nats."""
    return _next_token_loss(model, _causal_hidden(model, ids), ids)


def joint_loss_sum(model: ReferenceModel, batch: Batch, block_length: int) -> tuple[Tensor, Tensor]:
    """Summed (L_AR, L_diffusion), in nats; each masked token's loss is weighted by 1 / its mask probability."""
    noisy_hidden, clean_hidden = _dual_stream(model, batch.ids, batch.masked, block_length)
    weights = (1 / batch.probability).expand_as(batch.masked)
    diffusion = _masked_loss(model, noisy_hidden, batch.ids, batch.masked, weights)
    return _next_token_loss(model, clean_hidden, batch.ids), diffusion


def draft_weights(length: int, block_length: int) -> Tensor:
    """Weights ``[length]`` of the tokens of whole blocks: 0 for a block's given first token, then falling."""
    offset = torch.arange(length) % block_length
    return torch.where(offset == 0, 0.0, POSITION_DECAY ** (offset - 1).float())


def draft_loss_sum(
    model: ReferenceModel, teacher: ReferenceModel, ids: Tensor, prefix: int, block_length: int
) -> tuple[Tensor, Tensor]:
    """Summed (KL from the teacher's causal predictions, weighted L_draft), in nats.

    ``ids`` are int64 ``[sequences, length]``: ``prefix`` tokens of real text, then the teacher's own continuation. The
    draft's input is a single-pass draft's (t = 1, the block's first token given). The KL keeps the causal pass
    unchanged, over all of ``ids``; without it, drafts get better only because the text gets more monotonous.
    """
    weights = draft_weights(ids.shape[1] - prefix, block_length).to(ids.device).expand(len(ids), -1)
    noisy_hidden, clean_hidden = _dual_stream(model, ids, weights > 0, block_length, prefix)
    drafts = _masked_loss(model, noisy_hidden, ids[:, prefix:], weights > 0, weights)
    with torch.no_grad():
        wanted = teacher.diffusion_head(_causal_hidden(teacher, ids)).float().log_softmax(-1)
    found = model.diffusion_head(clean_hidden).float().log_softmax(-1)
    return F.kl_div(found, wanted, reduction="sum", log_target=True), drafts


def _dual_stream(
    model: ReferenceModel, ids: Tensor, masked: Tensor, block_length: int, start: int = 0
) -> tuple[Tensor, Tensor]:
    length = ids.shape[1]
    noisy = torch.where(masked, model.config.mask_token_id, ids[:, start:])
    positions = torch.arange(length, device=ids.device)
    mask = dual_stream_mask(length, block_length, ids.device, start)
    hidden = model.hidden(torch.cat((noisy, ids), dim=1), torch.cat((positions[start:], positions)), mask)
    noisy_hidden, clean_hidden = hidden.split((length - start, length), dim=1)
    return noisy_hidden, clean_hidden


def _masked_loss(model: ReferenceModel, hidden: Tensor, ids: Tensor, masked: Tensor, weights: Tensor) -> Tensor:
    logits = model.diffusion_head(hidden[masked]).float()
    return (F.cross_entropy(logits, ids[masked], reduction="none") * weights[masked]).sum()


def _causal_hidden(model: ReferenceModel, ids: Tensor) -> Tensor:
    length = ids.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
    return model.hidden(ids, torch.arange(length, device=ids.device), mask)


def _next_token_loss(model: ReferenceModel, hidden: Tensor, ids: Tensor) -> Tensor:
    logits = model.diffusion_head(hidden[:, :-1]).float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
