"""What the draft adapter learns: drafts that the causal pass of the same frozen weights accepts.

First a clean, causal stream runs without gradients. Drafts attend to its keys and values, and are judged by its logits.
Then one bidirectional pass drafts many blocks of every sequence at once; a block (its first token given, all others
masked) attends to all of itself and to the clean text before it, as in a draft pass of self-speculation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_nld.reference import DraftAdapter, KVCache, ReferenceModel

_LOGIT_ROWS = 1024
"""Rows of logits in memory at once where only the argmax is needed: a released vocabulary has 131072 entries."""


@dataclass(frozen=True)
class Target:
    """The clean stream of a batch.

    Attributes:
        ids: int64 ``[rows, length]``, the text.
        cache: its keys and values, from causal attention.
        hidden: ``[rows, length, hidden]``; row i predicts position i + 1.
        tokens: int64 ``[rows, length]``, the argmax of each row, which is verify's token.
        ended: bool ``[rows, length]``, the generated text has ended at or before this position.
    """

    ids: Tensor
    cache: KVCache
    hidden: Tensor
    tokens: Tensor
    ended: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: ReferenceModel, ids: Tensor, prefix: int = 0, eos: frozenset[int] = frozenset()) -> Target:
        """Run the causal pass over ``ids``; an id of ``eos`` ends a row's text, from position ``prefix`` on."""
        length = ids.shape[1]
        positions, cache = torch.arange(length, device=ids.device), KVCache()
        causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        hidden = model.hidden(ids, positions, causal, cache, write=True)
        ends = torch.isin(ids, torch.tensor(sorted(eos), dtype=ids.dtype, device=ids.device)) & (positions >= prefix)
        return cls(ids, cache, hidden, argmax(model, hidden), ends.cumsum(1) > 0)


@dataclass(frozen=True)
class Drafts:
    """Blocks drafted over a :class:`Target`; the given first token of a block is left out.

    Attributes:
        hidden: ``[rows, blocks, block_length - 1, hidden]``, with gradients.
        rows: int64 ``[rows, blocks, block_length - 1]``, the row of the clean stream that judges each draft.
        accepted: bool, same shape.
        counted: bool, same shape: the accepted drafts and the first rejected one.
    """

    hidden: Tensor
    rows: Tensor
    accepted: Tensor
    counted: Tensor

    @classmethod
    def over(
        cls, model: ReferenceModel, adapter: DraftAdapter | None, target: Target, starts: Tensor, block_length: int
    ) -> Drafts:
        """Draft blocks that begin at ``starts``, int64 ``[rows, blocks]``, each at most ``length - block_length``."""
        hidden = _draft_hidden(model, adapter, target, starts, block_length)[:, :, 1:]
        rows = starts[..., None] + torch.arange(block_length - 1, device=starts.device)
        wanted = _pick(target.tokens, rows)
        # On text that the model did not write, verify departs from the text at some point. What it would say after that
        # is unknown, so the block ends there, as it does at the end of the generated text.
        departed = wanted != _pick(target.ids, rows + 1)
        wrong = argmax(model, hidden.detach()) != wanted
        stops = (departed | wrong).to(torch.int64)
        counted = (stops.cumsum(-1) == stops) & ~_pick(target.ended, rows)
        return cls(hidden, rows, counted & ~wrong, counted)

    def emitted(self) -> Tensor:
        """Return the tokens that a cycle of each block yields, accepted + 1, int64 ``[rows, blocks]``."""
        return 1 + self.accepted.sum(-1)


@torch.no_grad()
def next_cycles(
    model: ReferenceModel, adapter: DraftAdapter | None, target: Target, starts: Tensor, block_length: int
) -> tuple[Tensor, Tensor]:
    """Return where the cycles after those at ``starts`` begin, int64 ``[rows, blocks]``, and their weights.

    When serving, a cycle begins at a token that the previous drafts got wrong. Blocks that begin at random mostly lie
    where drafts are easy. Each cycle should also count once, whatever its length, but ``starts`` drawn evenly choose
    the cycle after a long one more often. So its weight is 1 / the tokens of the previous cycle. A cycle that would
    leave the text is replaced by the previous one.
    """
    emitted = Drafts.over(model, adapter, target, starts, block_length).emitted()
    after = starts + emitted
    return torch.where(after <= target.ids.shape[1] - block_length, after, starts), 1 / emitted


def block_mask(starts: Tensor, block_length: int, length: int) -> Tensor:
    """Return the attention mask of :meth:`Drafts.over`, bool ``[rows, 1, drafted, length + drafted]``.

    Rows are the drafted tokens of all blocks; columns are [clean text | drafted]. A block attends to the clean text
    before its start, and to itself.
    """
    blocks = starts.shape[1]
    clean = torch.arange(length, device=starts.device) < starts[..., None]
    own = torch.eye(blocks, dtype=torch.bool, device=starts.device).repeat_interleave(block_length, 1)
    both = torch.cat((clean, own.expand(len(starts), -1, -1)), dim=-1)
    return both.repeat_interleave(block_length, 1)[:, None]


def _draft_hidden(
    model: ReferenceModel, adapter: DraftAdapter | None, target: Target, starts: Tensor, block_length: int
) -> Tensor:
    blocks = torch.full((*starts.shape, block_length), model.config.mask_token_id, device=starts.device)
    blocks[..., 0] = target.ids.gather(1, starts)
    positions = (starts[..., None] + torch.arange(block_length, device=starts.device)).flatten(1)
    mask = block_mask(starts, block_length, target.ids.shape[1])
    hidden = model.hidden(blocks.flatten(1), positions, mask, target.cache, adapter=adapter)
    return hidden.view(*blocks.shape, -1)


@dataclass(frozen=True)
class Objective:
    """The loss; the defaults are the published ones: LK-hybrid distribution matching plus cross-entropy.

    Attributes:
        kl_weight: weight of the distribution matching.
        ce_weight: weight of the cross-entropy against verify's argmax, at temperature 1.
        temperature: temperature of both matched distributions.
        top_k: the distributions are restricted to the union of their ``top_k`` most probable tokens.
        eta: how quickly LK-hybrid moves from KL to total variation as the distributions agree more.
    """

    kl_weight: float = 1.0
    ce_weight: float = 1.0
    temperature: float = 3.0
    top_k: int = 200
    eta: float = 3.0

    def loss_sum(self, model: ReferenceModel, target: Target, drafts: Drafts, weights: Tensor | None = None) -> Tensor:
        """Return the loss, in nats, summed over the counted drafts. ``weights`` of the blocks: ``[rows, blocks]``."""
        row = torch.arange(len(target.ids), device=target.ids.device)[:, None, None].expand_as(drafts.rows)
        row, place = row[drafts.counted], drafts.rows[drafts.counted]
        found = model.logits(drafts.hidden[drafts.counted])
        with torch.no_grad():
            wanted = model.logits(target.hidden[row, place])
        cross_entropy = torch.nn.functional.cross_entropy(found, target.tokens[row, place], reduction="none")
        matching = lk_hybrid(wanted, found, self.temperature, self.top_k, self.eta)
        loss = self.kl_weight * matching + self.ce_weight * cross_entropy
        if weights is not None:
            loss = loss * weights[..., None].expand_as(drafts.rows)[drafts.counted]
        return loss.sum()


def lk_hybrid(wanted: Tensor, found: Tensor, temperature: float, top_k: int, eta: float) -> Tensor:
    """Return the LK-hybrid loss (arXiv 2602.23881) of each row, float32 ``[rows]``.

    With p and q the distributions of ``wanted`` and ``found`` (logits ``[rows, vocab]``), and a = sum min(p, q), which
    is the probability that speculative sampling accepts: l KL(p, q) + (1 - l)(1 - a), where l = exp(-eta a) is held
    fixed. KL pulls very different distributions together; acceptance depends on the total variation.
    """
    # Without the mask token, whose logit is minus infinity in both.
    top_k = min(top_k, wanted.shape[-1] - 1)
    support = torch.zeros_like(wanted, dtype=torch.bool)
    for logits in (wanted, found.detach()):
        support.scatter_(-1, logits.topk(top_k, dim=-1).indices, True)
    # Compact before the softmax, because the union is far smaller than the vocabulary. Its size differs by row.
    size = int(support.sum(-1).max())
    inside, columns = support.to(torch.uint8).topk(size, dim=-1)
    log_p, log_q = (
        (logits.gather(-1, columns) / temperature).masked_fill(inside == 0, -1e9).log_softmax(-1)
        for logits in (wanted, found)
    )
    p, q = log_p.exp(), log_q.exp()
    agreement = torch.minimum(p, q).sum(-1)
    share = torch.exp(-eta * agreement.detach())
    return share * (p * (log_p - log_q)).sum(-1) + (1 - share) * (1 - agreement)


@torch.no_grad()
def argmax(model: ReferenceModel, hidden: Tensor) -> Tensor:
    """Return the most probable token of each row, int64, the shape of ``hidden`` without its last axis."""
    rows = torch.split(hidden.flatten(0, -2), _LOGIT_ROWS)
    return torch.cat([model.logits(part).argmax(-1) for part in rows]).view(hidden.shape[:-1])


def _pick(values: Tensor, places: Tensor) -> Tensor:
    """Return ``values[row, places[row, ...]]`` for ``values`` ``[rows, length]``."""
    return values.gather(1, places.flatten(1)).view(places.shape)
