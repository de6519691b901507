"""Diffusion on the speculative-decoding path: a denoised block is committed by the causal pass, not judged by it.

Verification of self-speculation is vLLM's rejection sampler as it is, or for greedy steps what gives the same at less
cost. For the rows of diffusion requests its target distribution is replaced by certainty of the draft, after the
log-probabilities' copy was taken, so those still say what the causal pass thought of each token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_nld.errors import NLDError
from vllm_nld.vllm_glue import sampling
from vllm_nld.vllm_glue.greedy_verify import readable, verify_greedily


def accept_diffusion(rejection_sampler: Any, is_diffusion: Callable[[int], bool]) -> None:
    """Make a rejection sampler accept every draft of the rows for which ``is_diffusion(row)`` holds; idempotent."""
    original = rejection_sampler.apply_logits_processors
    if getattr(original, "accepts_diffusion", False):
        return

    def apply(logits: Tensor, sampling_metadata: Any, metadata: Any) -> Tensor:
        processed: Tensor = original(logits, sampling_metadata, metadata)
        start = 0
        for row, drafts in enumerate(metadata.num_draft_tokens):
            if drafts and is_diffusion(row):
                rows = torch.arange(start, start + drafts, device=processed.device)
                ids = metadata.draft_token_ids[rows].long()[:, None]
                processed[rows] = torch.full_like(processed[rows], -torch.inf).scatter_(1, ids, 0.0)
            start += drafts
        return processed

    apply.accepts_diffusion = True  # type: ignore[attr-defined]
    rejection_sampler.apply_logits_processors = apply


def pack_draft_probs(metadata: Any, by_row: Sequence[Tensor | None], vocab_size: int) -> Tensor:
    """Return a step's draft distributions, float32 ``[drafts, vocab]``; drafts that were not drawn are certain.

    Args:
        metadata: vLLM's ``SpecDecodeMetadata``.
        by_row: float32 ``[drafts or more, vocab]`` of a row whose drafts were drawn, else None.
        vocab_size: columns.
    """
    ids = metadata.draft_token_ids.long()[:, None]
    probs = torch.zeros(len(ids), vocab_size, device=ids.device).scatter_(1, ids, 1.0)
    start = 0
    for own, count in zip(by_row, metadata.num_draft_tokens, strict=True):
        if own is not None:
            probs[start : start + count] = own[:count]
        start += count
    return probs


def guide_verification(
    rejection_sampler: Any, draft_probs: Callable[[Any], Tensor | None], is_diffusion: Callable[[int], bool]
) -> None:
    """Have a rejection sampler told what drafts were drawn from, and left out where it is not needed; idempotent.

    vLLM asks its own draft models for their distributions, but not a proposer of ``custom_class``. And it runs the
    rejection sampler in every step, also in one without drafts, where a request with ``top_k`` and no ``top_p`` ends
    the engine: ``apply_top_k_only`` takes the maximum of nothing (seen in 0.32.0). The plain sampler gives the same.
    A step of greedy requests alone, whose logits nobody changes, is decided by :mod:`vllm_nld.vllm_glue.greedy_verify`.

    Args:
        rejection_sampler: vLLM's.
        draft_probs: returns a step's draft distributions, given its ``SpecDecodeMetadata``; None if no draft was drawn.
        is_diffusion: whether a row's drafts are accepted anyway (:func:`accept_diffusion`).

    Raises:
        NLDError: the sampler's ``forward`` has other arguments than the ones this knows.
    """
    original = rejection_sampler.forward
    if getattr(original, "is_guided", False):
        return
    names = list(inspect.signature(original).parameters)
    if names != ["metadata", "draft_probs", "logits", "sampling_metadata"]:
        raise NLDError(f"vllm.v1.sample.rejection_sampler.RejectionSampler.forward changed: its arguments are {names}")

    def forward(metadata: Any, probs: Tensor | None, logits: Tensor, sampling_metadata: Any) -> Any:
        if not any(metadata.num_draft_tokens):
            return rejection_sampler.sampler(logits, sampling_metadata, predict_bonus_token=True)
        committed = any(drafts and is_diffusion(row) for row, drafts in enumerate(metadata.num_draft_tokens))
        plain = not committed and sampling.decides_by_argmax(rejection_sampler, sampling_metadata)
        if plain and readable(logits):
            return sampling.sampler_output(verify_greedily(metadata, logits))
        return original(metadata, draft_probs(metadata) if probs is None else probs, logits, sampling_metadata)

    forward.is_guided = True  # type: ignore[attr-defined]
    rejection_sampler.forward = forward
