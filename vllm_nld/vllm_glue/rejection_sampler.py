"""How each request's drafts are verified: by rejection sampling, by the draws of its seed, or not at all.

Self-speculation is verified by vLLM's unchanged rejection sampler, or in greedy steps by a cheaper equivalent. For two
kinds of requests, the target distribution is replaced by certainty. The log-probabilities are copied before, so they
still give the causal pass's probability of each token:

- diffusion: certainty of the draft, because the causal pass commits a denoised block and does not judge it.
- seeded requests: certainty of the token that the causal pass draws at this position (:mod:`vllm_nld.ops.noise`). A
  draft is accepted if it is that token; else that token replaces it. The text equals AR's text with this seed, for any
  draft.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_nld.errors import NLDError
from vllm_nld.ops.noise import Noise
from vllm_nld.vllm_glue import sampling
from vllm_nld.vllm_glue.greedy_verify import readable, verify_greedily
from vllm_nld.vllm_glue.versions import SUPPORTED


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
                places = torch.arange(start, start + drafts, device=processed.device)
                _make_certain(processed, places, metadata.draft_token_ids[places])
            start += drafts
        return processed

    apply.accepts_diffusion = True  # type: ignore[attr-defined]
    rejection_sampler.apply_logits_processors = apply


def _make_certain(logits: Tensor, places: Tensor, tokens: Tensor) -> None:
    """Make one token the only possible one, in place.

    Args:
        logits: float ``[rows, vocab]``.
        places: int64 ``[places]``, the rows to change.
        tokens: ``[places]``, the certain token of each.
    """
    logits.index_fill_(0, places, -torch.inf)
    logits[places, tokens.long()] = 0.0


@dataclass
class _Seeded:
    """A step's drafts of seeded requests: their places among all drafts, their batch rows, and their generators."""

    places: Tensor
    rows: Tensor
    generators: dict[int, torch.Generator]


def _seeded(metadata: Any, noise_at: Callable[[int], tuple[Noise, int] | None]) -> _Seeded | None:
    places: list[int] = []
    rows: list[int] = []
    generators: dict[int, torch.Generator] = {}
    device = metadata.draft_token_ids.device
    start = 0
    for row, drafts in enumerate(metadata.num_draft_tokens):
        found = noise_at(row) if drafts else None
        if found is not None:
            noise, position = found
            for draft in range(drafts):
                generators[len(rows)] = noise.generator(position + draft, device)
                places.append(start + draft)
                rows.append(row)
        start += drafts
    if not rows:
        return None
    return _Seeded(torch.tensor(places, device=device), torch.tensor(rows, device=device), generators)


def draw_seeded(
    rejection_sampler: Any, noise_at: Callable[[int], tuple[Noise, int] | None], seed_draws: Callable[[], None]
) -> None:
    """Have seeded requests' tokens drawn by seed and position, in steps with and without drafts; idempotent.

    Args:
        rejection_sampler: vLLM's, whose plain sampler also serves steps without drafts.
        noise_at: returns the random numbers of a row whose seed verifies its drafts, and its first draft's position.
        seed_draws: called before the plain sampler draws one token per row.

    Raises:
        NLDError: the samplers lack an attribute that this relies on.
    """
    sampler = rejection_sampler.sampler
    plain_forward = sampler.forward
    if getattr(plain_forward, "draws_seeded", False):
        return
    for owner, name in ((sampler, "topk_topp_sampler"), (rejection_sampler, "_get_logprobs_tensors")):
        if not hasattr(owner, name):
            kind = type(owner).__name__
            raise NLDError(f"this vLLM's {kind} has no {name!r}; vllm-nld supports vLLM {SUPPORTED}")

    @functools.wraps(plain_forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        seed_draws()
        return plain_forward(*args, **kwargs)

    forward.draws_seeded = True  # type: ignore[attr-defined]
    sampler.forward = forward

    process, logprobs = rejection_sampler.apply_logits_processors, rejection_sampler._get_logprobs_tensors
    drawn_from: list[tuple[Tensor, Tensor]] = []

    @functools.wraps(process)
    def apply(logits: Tensor, sampling_metadata: Any, metadata: Any) -> Tensor:
        processed: Tensor = process(logits, sampling_metadata, metadata)
        drawn_from.clear()
        seeded = _seeded(metadata, noise_at)
        if seeded is not None:
            tokens, kept = _draw(sampler.topk_topp_sampler, processed[seeded.places], seeded, sampling_metadata)
            _make_certain(processed, seeded.places, tokens)
            if kept is not None:
                drawn_from.append((seeded.places, kept))
        return processed

    @functools.wraps(logprobs)
    def get_logprobs(most: Any, metadata: Any, logits: Tensor, targets: Tensor, *others: Any) -> Any:
        """As vLLM's; ``--logprobs-mode processed_*`` shows the distribution that was drawn from, not the certainty."""
        for places, kept in drawn_from:
            targets[places] = kept
        return logprobs(most, metadata, logits, targets, *others)

    rejection_sampler.apply_logits_processors = apply
    rejection_sampler._get_logprobs_tensors = get_logprobs


def _draw(sampler: Any, logits: Tensor, seeded: _Seeded, sampling_metadata: Any) -> tuple[Tensor, Tensor | None]:
    """Return the causal pass's draw at each place, ``[places]``, and its distribution if log-probabilities need it."""

    def of_rows(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[seeded.rows]

    logits.div_(sampling_metadata.temperature[seeded.rows, None])
    top_k, top_p = of_rows(sampling_metadata.top_k), of_rows(sampling_metadata.top_p)
    tokens: tuple[Tensor, Tensor | None] = sampler(logits, seeded.generators, top_k, top_p)
    return tokens


def pack_draft_probs(metadata: Any, by_row: Sequence[Tensor | None], vocab_size: int) -> Tensor:
    """Return a step's draft distributions, float32 ``[drafts, vocab]``; other drafts than drawn ones are certain.

    Args:
        metadata: vLLM's ``SpecDecodeMetadata``.
        by_row: float32 ``[drafts or more, vocab]`` for a row whose drafts were drawn, else None.
        vocab_size: number of columns.
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
    """Pass the drafts' distributions to a rejection sampler, and skip it where it is not needed; idempotent.

    vLLM asks its own draft models for their distributions, but not a proposer of ``custom_class``. And it runs the
    rejection sampler in every step. In a step without drafts, a request with ``top_k`` and no ``top_p`` then ends the
    engine, because ``apply_top_k_only`` takes the maximum of an empty tensor (seen in 0.32.0). The plain sampler gives
    the same result. A step with only greedy requests, whose logits nothing changes, is decided by
    :mod:`vllm_nld.vllm_glue.greedy_verify`.

    Args:
        rejection_sampler: vLLM's.
        draft_probs: returns a step's draft distributions, given its ``SpecDecodeMetadata``; None if no draft was drawn.
        is_diffusion: whether a row's drafts are accepted anyway (:func:`accept_diffusion`).

    Raises:
        NLDError: the sampler's ``forward`` has unknown arguments.
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
