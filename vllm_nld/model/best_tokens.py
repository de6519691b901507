"""The most probable token of a row and its probability, without gathering the logits of the whole vocabulary.

With tensor parallelism every rank holds the head's rows of a share of the vocabulary. Gathering the logits moves
``vocab`` numbers per row; a greedy draft needs only the largest one, its token and the normalizer. So every shard sends
three numbers per row, and every rank combines them in the same way.

A draft adapter changes the hidden states that are passed in; this module does not know about it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_gather

from vllm_nld import ops


class Best(NamedTuple):
    """The most probable tokens of some rows.

    Attributes:
        tokens: int64 ``[rows]``; among equally probable ones the lowest id, like ``argmax`` over all logits.
        probability: float32 ``[rows]``.
    """

    tokens: Tensor
    probability: Tensor


def best_tokens(model: Any, hidden: Tensor) -> Best:
    """Return the best tokens of hidden states ``[rows, hidden]``, never the mask token.

    Args:
        model: an :class:`vllm_nld.model.network.NLDForCausalLM`; all ranks must call this with the same hidden states.
        hidden: the last layer's output.
    """
    logits, first_id = model.shard_logits(hidden)
    if first_id is None:
        return best_of(logits)
    return combine(tensor_model_parallel_all_gather(shard_summary(logits, first_id)[None], dim=0))


def best_of(logits: Tensor) -> Best:
    """Return the best tokens of whole logits ``[rows, vocab]``: float32, bfloat16 or float16, inner stride 1."""
    tokens, largest, normalizer = ops.function("best_tokens", logits.device.type)(logits)
    return Best(tokens, (largest - normalizer).exp())


def probability_of(tokens: Tensor, logits: Tensor) -> Tensor:
    """Return the probability of one token per row, float32 ``[rows]``, for float32 ``[rows, vocab]``."""
    return (logits.gather(1, tokens[:, None]).squeeze(1) - torch.logsumexp(logits, -1)).exp()


def shard_summary(logits: Tensor, first_id: int) -> Tensor:
    """Return a shard's largest logit, its token id and the log of the shard's normalizer, float32 ``[rows, 3]``.

    Args:
        logits: the shard's columns, ``[rows, columns]``, as for :func:`best_of`. There may be none, because vLLM pads
            vocabularies, and a small one fills only the first shards.
        first_id: token id of the first column. Ids below 2^24 are exact in float32.
    """
    if logits.shape[1] == 0:
        summary = logits.new_full((len(logits), 3), -torch.inf, dtype=torch.float32)
        summary[:, 1] = 0.0  # an id; filling does not wait for the device, unlike a tensor made on the host
        return summary
    tokens, largest, normalizer = ops.function("best_tokens", logits.device.type)(logits)
    return torch.stack((largest, (tokens + first_id).float(), normalizer), 1)


def combine(summaries: Tensor) -> Best:
    """Combine float32 ``[shards, rows, 3]``, shards in ascending order of their token ids."""
    largest, ids, normalizers = summaries.unbind(-1)
    shard = largest.argmax(0, keepdim=True)  # among equal ones the first, which has the lowest ids
    tokens = ids.gather(0, shard).squeeze(0).long()
    probability = (largest.gather(0, shard).squeeze(0) - torch.logsumexp(normalizers, 0)).exp()
    return Best(tokens, probability)
