"""States that a sampler visits, and the cost of a commit there: the learned sampler's training data.

From every visited state, serial denoising (one position per forward, the surest first) leads to one finished block.
A trial commits further positions besides the surest and denoises serially from there; its cost is the number of tokens
that differ in the end. A trial stops when it reaches a state of the serial run, as most soon do.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_nld.draft_pass.learned_sampler import LearnedSampler, statistics
from vllm_nld.reference import KVCache, ReferenceModel

TRIALS = 4
"""Trials kept per state: single positions, and last the visiting sampler's own commit."""
UNTRIED = -1


@dataclass
class States:
    """Partly denoised blocks: the predicted (or committed) tokens, the mask, the features, the labels.

    Attributes:
        right: whether the token is the one that serial denoising from this state ends with.
        present: False after the end of a block that is shorter than others.
        trials: bool ``[states, TRIALS, length]``, the positions committed besides the surest.
        lost: int8 ``[states, TRIALS]``, how many tokens of the finished block changed; UNTRIED without a trial.
    """

    tokens: Tensor
    masked: Tensor
    features: Tensor
    right: Tensor
    present: Tensor
    trials: Tensor
    lost: Tensor

    @classmethod
    def join(cls, parts: list[States]) -> States:
        """Concatenate along the first dimension."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def take(self, rows: Tensor) -> States:
        """Return some of the states."""
        return States(*(getattr(self, field.name)[rows] for field in fields(self)))

    def widen(self, length: int) -> States:
        """Pad the blocks to ``length``."""
        short = length - self.tokens.shape[1]
        return States(
            F.pad(self.tokens, (0, short)), F.pad(self.masked, (0, short)), F.pad(self.features, (0, 0, 0, short)),
            F.pad(self.right, (0, short)), F.pad(self.present, (0, short)), F.pad(self.trials, (0, short)), self.lost,
        )  # fmt: skip


class Denoiser:
    """Blocks after a batch of prefixes, denoised by one model."""

    def __init__(self, model: ReferenceModel, prefixes: Tensor, length: int) -> None:
        self.model, self.length, self.mask_id = model, length, model.config.mask_token_id
        self.cache = KVCache()
        seeds = model.causal(prefixes, self.cache)[:, -1].argmax(-1, keepdim=True)
        self.empty = torch.cat((seeds, torch.full((len(seeds), length - 1), self.mask_id)), dim=1)

    def logits(self, owners: Tensor, blocks: Tensor) -> Tensor:
        """Run a bidirectional forward of ``blocks``, each after the prefix of its owner."""
        if len(owners) == len(self.empty) and torch.equal(owners, torch.arange(len(owners))):
            return self.model.bidirectional(blocks, self.cache)
        own = KVCache([key[owners] for key in self.cache.keys], [value[owners] for value in self.cache.values])
        return self.model.bidirectional(blocks, own)

    def settle(self, owners: Tensor, blocks: Tensor, known: Tensor | None = None) -> Tensor:
        """Denoise serially; returns the states on the way, by number of masks: int64 ``[rows, length + 1, length]``.

        Args:
            owners: int64 ``[rows]``, the prefix of each block.
            blocks: int64 ``[rows, length]``.
            known: the result of an earlier call for each row; a block that reaches one of its states follows it.
        """
        paths = torch.zeros(len(blocks), self.length + 1, self.length, dtype=torch.int64)
        rows, blocks = torch.arange(len(blocks)), blocks.clone()
        while len(rows):
            left = (blocks == self.mask_id).sum(1)
            paths[rows, left] = blocks
            if known is not None:
                met = (known[rows, left] == blocks).all(1)
                below = torch.arange(self.length + 1) <= left[:, None]
                paths[rows] = torch.where((met[:, None] & below)[..., None], known[rows], paths[rows])
                left = left.masked_fill(met, 0)
            rows, blocks = rows[left > 0], blocks[left > 0]
            if len(rows):
                tokens, _, surest = choose(self.logits(owners[rows], blocks), blocks == self.mask_id)
                blocks = torch.where(surest, tokens, blocks)
        return paths


def choose(logits: Tensor, masked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the most probable tokens, their probability (-1 where decided), and where the surest is (bool)."""
    best = logits.max(-1)
    confidence = (best.values - logits.logsumexp(-1)).exp().masked_fill(~masked, -1.0)
    surest = F.one_hot(confidence.argmax(1), masked.shape[1]).bool() & masked
    return best.indices, confidence, surest


@dataclass
class Visitor:
    """The sampler whose states are collected. Thresholds are drawn per block and scores have noise, to vary states."""

    sampler: LearnedSampler | None
    generator: torch.Generator
    tried: float = 0.6
    tried_wrong: float = 0.15
    noise: float = 0.5

    def thresholds(self, rows: int) -> Tensor:
        """Draw thresholds from 0.4 to 0.98, evenly by log-odds."""
        low, high = torch.logit(torch.tensor([0.4, 0.98])).tolist()
        return (low + (high - low) * torch.rand(rows, 1, generator=self.generator)).sigmoid()

    def scores(self, logits: Tensor, blocks: Tensor, masked: Tensor, confidence: Tensor) -> Tensor:
        """Return the sampler's scores, or the model's own confidence."""
        plain = confidence if self.sampler is None else self.sampler.scores(logits, blocks, masked)
        shaken = torch.logit(plain, eps=1e-4) + self.noise * torch.randn(plain.shape, generator=self.generator)
        return torch.where(masked, shaken.sigmoid(), -1.0)

    def candidates(self, open_: Tensor, scores: Tensor) -> Tensor:
        """Draw up to TRIALS - 1 positions per row, preferably of high score: bool ``[rows, k, length]``."""
        shaken = scores.clamp_min(0.02).log() - torch.rand(scores.shape, generator=self.generator).log().neg().log()
        places = shaken.masked_fill(~open_, -torch.inf).topk(min(TRIALS - 1, scores.shape[1]), dim=1).indices
        return F.one_hot(places, scores.shape[1]).bool() & open_[:, None]

    def worth(self, trials: Tensor, right: Tensor) -> Tensor:
        """Return which trials to make: the visitor's own (its next state), and some of the single positions.

        A wrong token's trial is long (it never meets the serial run again) and tells little, so few are made.
        """
        made = trials.any(-1)
        wrong = (trials & ~right[:, None]).any(-1)
        share = torch.where(wrong, self.tried_wrong, self.tried)
        made[:, :-1] &= (torch.rand(made.shape, generator=self.generator) < share)[:, :-1]
        return made


def collect(denoiser: Denoiser, visitor: Visitor) -> States:
    """Return the states that the visitor goes through on one block after each prefix."""
    blocks = denoiser.empty.clone()
    owners, thresholds = torch.arange(len(blocks)), visitor.thresholds(len(blocks))
    paths, parts = denoiser.settle(owners, blocks), list[States]()
    while len(owners):
        masked = blocks == denoiser.mask_id
        logits = denoiser.logits(owners, blocks)
        tokens, confidence, surest = choose(logits, masked)
        open_ = masked & ~surest
        scores = visitor.scores(logits, blocks, masked, confidence)
        own = open_ & (scores >= thresholds[owners])
        trials = torch.cat((visitor.candidates(open_, scores), own[:, None]), dim=1)
        shown = torch.where(masked, tokens, blocks)
        right = shown == paths[:, 0]
        after = torch.where(trials | surest[:, None], shown[:, None], blocks[:, None])
        lost, own_paths = try_out(denoiser, owners, after, visitor.worth(trials, right), paths)
        features = statistics(logits, masked, torch.ones_like(masked)).half()
        parts.append(States(shown.short(), masked, features, right, torch.ones_like(masked), trials, lost))
        going = (after[:, -1] == denoiser.mask_id).any(1)
        owners, blocks, paths = owners[going], after[going, -1], own_paths[going]
    return States.join(parts)


def try_out(denoiser: Denoiser, owners: Tensor, after: Tensor, tried: Tensor, paths: Tensor) -> tuple[Tensor, Tensor]:
    """Denoise serially from the blocks after the trials.

    Args:
        denoiser: the denoiser.
        owners: int64 ``[rows]``, the prefixes.
        after: int64 ``[rows, TRIALS, length]``, the blocks.
        tried: bool ``[rows, TRIALS]``, where there is a trial.
        paths: the serial run from before the trial, as :meth:`Denoiser.settle` returns it.

    Returns:
        ``lost`` of :class:`States`, and the serial runs after the last trial (the serial run before it if there was
            none).
    """
    state, which = tried.nonzero(as_tuple=True)
    found = denoiser.settle(owners[state], after[state, which], paths[state])
    lost = torch.full(tried.shape, UNTRIED, dtype=torch.int8)
    lost[state, which] = (found[:, 0] != paths[state, 0]).sum(1).to(torch.int8)
    last = which == tried.shape[1] - 1
    return lost, paths.index_copy(0, state[last], found[last])
