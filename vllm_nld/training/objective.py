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

_LOGITS_AT_ONCE = 1 << 28
"""Logits in memory at once: 1 GiB in float32, and some times that next to them."""
_LEAST_SHARE = 0.05
"""Drafts beyond the first rejected one that would count less are left out."""


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
    def of(
        cls, model: ReferenceModel, ids: Tensor, prefix: int | Tensor = 0, eos: frozenset[int] = frozenset()
    ) -> Target:
        """Run the causal pass over ``ids``; an id of ``eos`` ends a row's text, from position ``prefix`` on.

        ``prefix`` is one number, or int64 ``[rows, 1]``.
        """
        length = ids.shape[1]
        positions, cache = torch.arange(length, device=ids.device), KVCache()
        causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        hidden = model.hidden(ids, positions, causal, cache, write=True)
        ends = is_one_of(ids, eos) & (positions >= prefix)
        return cls(ids, cache, hidden, argmax(model, hidden), ends.cumsum(1) > 0)


@dataclass(frozen=True)
class Draws:
    """Which blocks draw their drafts at temperature 1, as a sampled request does; the others take the most probable.

    The random numbers are drawn for the whole batch beforehand, so that a step does not depend on its micro-batches.

    Attributes:
        drawn: bool ``[rows, blocks]``.
        uniform: float32 in [0, 1), ``[rows, blocks, block_length - 1]``.
    """

    drawn: Tensor
    uniform: Tensor

    @classmethod
    def of(cls, rows: int, blocks: int, block_length: int, share: float, generator: torch.Generator) -> Draws:
        """Draw for a batch; each block is a drawn one with probability ``share``."""
        drawn = torch.rand(rows, blocks, generator=generator) < share
        return cls(drawn, torch.rand(rows, blocks, block_length - 1, generator=generator))

    def split(self, size: int) -> list[Draws]:
        """Return those of the micro-batches of ``size`` rows."""
        return [
            Draws(*parts) for parts in zip(torch.split(self.drawn, size), torch.split(self.uniform, size), strict=True)
        ]

    def to(self, device: str | torch.device) -> Draws:
        """Return it on another device."""
        return Draws(self.drawn.to(device), self.uniform.to(device))


@dataclass(frozen=True)
class Drafts:
    """Blocks drafted over a :class:`Target`; the given first token of a block is left out.

    Attributes:
        hidden: ``[rows, blocks, block_length - 1, hidden]``, with gradients.
        rows: int64 ``[rows, blocks, block_length - 1]``, the row of the clean stream that judges each draft.
        accepted: bool, same shape.
        beyond: int64, same shape: 0 for the accepted drafts and the first rejected one, 1, 2, ... for those after it,
            -1 for those that nothing judges, after the end of the model's own text.
    """

    hidden: Tensor
    rows: Tensor
    accepted: Tensor
    beyond: Tensor

    @property
    def counted(self) -> Tensor:
        """The accepted drafts and the first rejected one, bool ``[rows, blocks, block_length - 1]``."""
        return self.beyond == 0

    @classmethod
    def over(
        cls,
        model: ReferenceModel,
        adapter: DraftAdapter | None,
        target: Target,
        starts: Tensor,
        block_length: int,
        draws: Draws | None = None,
    ) -> Drafts:
        """Draft blocks that begin at ``starts``, int64 ``[rows, blocks]``, each at most ``length - block_length``.

        Without ``draws``, drafts are the most probable tokens.
        """
        hidden = _draft_hidden(model, adapter, target, starts, block_length)[:, :, 1:]
        rows = starts[..., None] + torch.arange(block_length - 1, device=starts.device)
        wanted = _pick(target.tokens, rows)
        # On text that the model did not write, verify departs from the text at some point. What it would say after that
        # is unknown, so the block ends there, as it does at the end of the generated text.
        departed = wanted != _pick(target.ids, rows + 1)
        found = argmax(model, hidden.detach()) if draws is None else _chosen(model, hidden.detach(), draws)
        wrong = found != wanted
        lost = (departed.cumsum(-1) - departed.long() > 0) | _pick(target.ended, rows)
        after = (wrong.cumsum(-1) > 0).cumsum(-1)
        beyond = (after - 1).clamp(min=0).masked_fill(lost, -1)
        return cls(hidden, rows, (beyond == 0) & ~wrong, beyond)

    def emitted(self) -> Tensor:
        """Return the tokens that a cycle of each block yields, accepted + 1, int64 ``[rows, blocks]``."""
        return 1 + self.accepted.sum(-1)


def next_cycles(target: Target, starts: Tensor, drafts: Drafts) -> tuple[Tensor, Tensor]:
    """Return where the cycles after ``drafts`` at ``starts`` begin, int64 ``[rows, blocks]``, and their weights.

    When serving, a cycle begins at a token that the previous drafts got wrong. Blocks that begin at random mostly lie
    where drafts are easy. Each cycle should also count once, whatever its length, but ``starts`` drawn evenly choose
    the cycle after a long one more often. So its weight is 1 / the tokens of the previous cycle. A cycle that would
    leave the text is replaced by the previous one.
    """
    emitted, block_length = drafts.emitted(), drafts.rows.shape[-1] + 1
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
        kl_weight: of the distribution matching.
        ce_weight: of the cross-entropy against verify's argmax, at temperature 1.
        temperature: of both distributions that are matched.
        top_k: both losses see only the union of so many most probable tokens of each distribution.
        eta: how quickly LK-hybrid goes from KL to total variation as the distributions come to agree.
        beyond: what a draft counts that comes after the first rejected one, to the power of its distance. 0 is the
            published loss. More teaches an untrained drafter several positions at once.
    """

    kl_weight: float = 1.0
    ce_weight: float = 1.0
    temperature: float = 3.0
    top_k: int = 200
    eta: float = 0.5
    beyond: float = 0.0

    def loss_sum(self, model: ReferenceModel, target: Target, drafts: Drafts, weights: Tensor | None = None) -> Tensor:
        """Return the sum of the blocks' losses, in nats.

        A block's loss is the mean over its counted drafts, so a long block counts no more than a short one.

        Args:
            weights: of the blocks, float ``[rows, blocks]``; 1 without.
        """
        share = self._shares(drafts)
        if weights is not None:
            share = share * weights[..., None]
        row, block, draft = share.nonzero(as_tuple=True)
        if not len(row):  # all texts have ended
            return drafts.hidden.sum() * 0
        place, share = drafts.rows[row, block, draft], share[row, block, draft]
        judges, tokens, hidden = target.hidden[row, place], target.tokens[row, place], drafts.hidden[row, block, draft]
        size = _rows_at_once(model)
        parts = zip(*(torch.split(part, size) for part in (judges, tokens, hidden, share)), strict=True)
        return torch.stack([self._part_sum(model, *part) for part in parts]).sum()

    def _shares(self, drafts: Drafts) -> Tensor:
        """Return what each draft counts in its block's mean, float32 ``[rows, blocks, block_length - 1]``."""
        share = drafts.counted.float()
        if self.beyond:
            share = (self.beyond ** drafts.beyond.float()).masked_fill(drafts.beyond < 0, 0.0)
            share = share.masked_fill(share < _LEAST_SHARE, 0.0)
        return share / share.sum(-1, keepdim=True).clamp(min=1)

    def _part_sum(self, model: ReferenceModel, judges: Tensor, tokens: Tensor, hidden: Tensor, share: Tensor) -> Tensor:
        """Return the sum over drafts, by the clean stream's ``judges``, its ``tokens`` and the drafts' ``hidden``."""
        found = model.logits(hidden)
        with torch.no_grad():
            wanted = model.logits(judges)
            support = Support.of(wanted, found, self.top_k)
        seen = support.seen(found)
        cross_entropy = -seen.log_softmax(-1).gather(-1, support.place_of(tokens)).squeeze(-1)
        matching = lk_hybrid(
            support.log_softmax(wanted, self.temperature), (seen / self.temperature).log_softmax(-1), self.eta
        )
        return ((self.kl_weight * matching + self.ce_weight * cross_entropy) * share).sum()


@dataclass(frozen=True)
class Support:
    """The tokens that either of two distributions gives most probability, per row; the rows differ in their number.

    Attributes:
        columns: int64 ``[rows, size]``, token ids.
        inside: bool, same shape; False for what only fills a row up.
    """

    columns: Tensor
    inside: Tensor

    @classmethod
    def of(cls, wanted: Tensor, found: Tensor, top_k: int) -> Support:
        """Return the union of the ``top_k`` most probable tokens of each; logits are ``[rows, vocab]``."""
        # Without the mask token, whose logit is minus infinity in both.
        top_k = min(top_k, wanted.shape[-1] - 1)
        both = [logits.topk(top_k, dim=-1, sorted=False).indices for logits in (wanted, found.detach())]
        columns = torch.cat(both, dim=-1).sort(dim=-1).values
        inside = torch.ones_like(columns, dtype=torch.bool)
        inside[:, 1:] = columns[:, 1:] != columns[:, :-1]
        return cls(columns, inside)

    def seen(self, logits: Tensor) -> Tensor:
        """Return those of ``logits`` ``[rows, vocab]`` that are in the support, ``[rows, size]``."""
        return logits.gather(-1, self.columns).masked_fill(~self.inside, -1e9)

    def log_softmax(self, logits: Tensor, temperature: float = 1.0) -> Tensor:
        """Return log-probabilities ``[rows, size]`` of ``logits`` ``[rows, vocab]``, renormalised on the support."""
        return (self.seen(logits) / temperature).log_softmax(-1)

    def place_of(self, tokens: Tensor) -> Tensor:
        """Return where ``tokens`` ``[rows]`` are in their rows, int64 ``[rows, 1]``.

        Verify's argmax is always there, so that no target is outside the support.
        """
        return (self.columns == tokens[:, None]).to(torch.uint8).argmax(-1, keepdim=True)


def lk_hybrid(log_p: Tensor, log_q: Tensor, eta: float) -> Tensor:
    """Return the LK-hybrid loss (arXiv 2602.23881) of each row, float32 ``[rows]``.

    With p and q the verifier's and the drafter's distributions (``[rows, size]``, their logarithms are given), and
    a = sum min(p, q), which is the chance that speculative sampling accepts: l KL(p, q) + (1 - l)(1 - a), where
    l = exp(-eta a) is held fixed. KL pulls distributions together that have little in common; total variation is what
    acceptance depends on.
    """
    p, q = log_p.exp(), log_q.exp()
    agreement = torch.minimum(p, q).sum(-1)
    share = torch.exp(-eta * agreement.detach())
    return share * (p * (log_p - log_q)).sum(-1) + (1 - share) * (1 - agreement)


@torch.no_grad()
def argmax(model: ReferenceModel, hidden: Tensor) -> Tensor:
    """Return the most probable token of each row, int64, the shape of ``hidden`` without its last axis."""
    rows = torch.split(hidden.flatten(0, -2), _rows_at_once(model))
    return torch.cat([model.logits(part).argmax(-1) for part in rows]).view(hidden.shape[:-1])


def is_one_of(ids: Tensor, tokens: frozenset[int]) -> Tensor:
    """Return which ``ids`` are among ``tokens``, bool of the same shape."""
    found = torch.zeros_like(ids, dtype=torch.bool)
    for token in tokens:
        found |= ids == token
    return found


def _rows_at_once(model: ReferenceModel) -> int:
    return max(1, _LOGITS_AT_ONCE // model.config.vocab_size)


@torch.no_grad()
def _chosen(model: ReferenceModel, hidden: Tensor, draws: Draws) -> Tensor:
    """Return each draft, int64 ``[rows, blocks, block_length - 1]``: a draw in drawn blocks, else the argmax."""
    drawn = draws.drawn[..., None].expand_as(draws.uniform)
    parts = (
        torch.split(part, _rows_at_once(model))
        for part in (hidden.flatten(0, -2), draws.uniform.flatten(), drawn.flatten())
    )
    found = []
    for rows, uniform, by_chance in zip(*parts, strict=True):
        logits = model.logits(rows)
        found.append(torch.where(by_chance, _drawn(logits, uniform), logits.argmax(-1)))
    return torch.cat(found).view(drawn.shape)


def _drawn(logits: Tensor, uniform: Tensor) -> Tensor:
    """Return one draw of each row's softmax, int64 ``[rows]``; what has no probability is never drawn."""
    sums = logits.softmax(-1).cumsum(-1)
    return (
        torch.searchsorted(sums, uniform[:, None] * sums[:, -1:], right=True)
        .squeeze(-1)
        .clamp(max=logits.shape[-1] - 1)
    )


def _pick(values: Tensor, places: Tensor) -> Tensor:
    """Return ``values[row, places[row, ...]]`` for ``values`` ``[rows, length]``."""
    return values.gather(1, places.flatten(1)).view(places.shape)
