"""The most probable token of a row and its probability, without gathering a vocabulary's logits.

With tensor parallelism every rank holds the head's rows of a share of the vocabulary. Gathering the logits moves
``vocab`` numbers per row; a greedy draft needs the largest one, whose it is, and the normaliser. So every shard
says three numbers per row, and every rank combines them in the same way.

A draft adapter changes the hidden states that come in here; nothing in this module knows of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_gather

from vllm_nld.block import Block

CACHED_ROWS = 16
"""Rows of logits that are reduced together on a CPU."""


class Best(NamedTuple):
    """The most probable tokens of some rows.

    Attributes:
        tokens: int64 ``[rows]``; of equally probable ones the lowest id, as ``argmax`` over all logits has it.
        probability: float32 ``[rows]``.
    """

    tokens: Tensor
    probability: Tensor


def needs_logits(block: Block) -> bool:
    """Whether a forward over a block needs more than the most probable tokens: it samples, or judges distributions."""
    return block.choice is not None or block.rule.sampler in ("entropy_budget", "learned")


def best_tokens(model: Any, hidden: Tensor) -> Best:
    """Return the best tokens of hidden states ``[rows, hidden]``; the mask token never is one.

    Args:
        model: an :class:`vllm_nld.model.NLDForCausalLM`; all ranks must call this with the same hidden states.
        hidden: the last layer's output.
    """
    logits, first_id = model.shard_logits(hidden)
    if first_id is None:
        return best_of(logits)
    return combine(tensor_model_parallel_all_gather(shard_summary(logits, first_id)[None], dim=0))


def best_of(logits: Tensor) -> Best:
    """Return the best tokens of whole logits ``[rows, vocab]``, any float dtype."""
    found = []
    for rows in _parts(logits):
        rows = rows.float()
        tokens = rows.argmax(-1)
        found.append(Best(tokens, probability_of(tokens, rows)))
    return Best(torch.cat([best.tokens for best in found]), torch.cat([best.probability for best in found]))


def probability_of(tokens: Tensor, logits: Tensor) -> Tensor:
    """Return the probability of one token per row, float32 ``[rows]``, for float32 ``[rows, vocab]``."""
    return (logits.gather(1, tokens[:, None]).squeeze(1) - torch.logsumexp(logits, -1)).exp()


def shard_summary(logits: Tensor, first_id: int) -> Tensor:
    """Return a shard's largest logit, its token id and the log of the shard's normaliser, float32 ``[rows, 3]``.

    Args:
        logits: the shard's columns, ``[rows, columns]``. There may be none: vLLM pads vocabularies, and a small one
            lies in the first shards alone.
        first_id: token id of the first column. Ids below 2^24 are exact in float32.
    """
    if logits.shape[1] == 0:
        return torch.tensor([-torch.inf, 0.0, -torch.inf], device=logits.device).expand(len(logits), 3).contiguous()
    return torch.cat([_summary(rows.float(), first_id) for rows in _parts(logits)])


def _summary(logits: Tensor, first_id: int) -> Tensor:
    largest = logits.argmax(-1, keepdim=True)
    return torch.cat((logits.gather(1, largest), largest + first_id, torch.logsumexp(logits, -1, keepdim=True)), 1)


def _parts(logits: Tensor) -> tuple[Tensor, ...]:
    """Split the rows so that a part stays in a CPU's cache while it is read several times."""
    return torch.split(logits, CACHED_ROWS if logits.device.type == "cpu" else max(1, len(logits)))  # type: ignore[no-any-return, no-untyped-call]


def combine(summaries: Tensor) -> Best:
    """Combine float32 ``[shards, rows, 3]``, shards in ascending order of their token ids."""
    largest, ids, normalisers = summaries.unbind(-1)
    shard = largest.argmax(0, keepdim=True)  # the first of equal ones, which has the lowest ids
    tokens = ids.gather(0, shard).squeeze(0).long()
    probability = (largest.gather(0, shard).squeeze(0) - torch.logsumexp(normalisers, 0)).exp()
    return Best(tokens, probability)
