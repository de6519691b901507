"""How much device memory rows over the vocabulary may take: logits and probabilities of drafts.

One such row is large: 512 KiB in float32 with 131072 tokens, and 64 requests draft 1984 of them. So rows are handled in
chunks, the ones that must be kept are limited, and vLLM's profiling run sees the most that there can be.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vllm_nld.draft_pass.token_choice import DraftChoice
from vllm_nld.vllm_glue import registration, sampling

CHUNK_BYTES = 1 << 28
"""Float32 logits of a draft pass that are at hand at a time: 512 rows of 131072 tokens. What is computed from them,
such as entropies, takes a few times as much."""

DRAWN_BYTES = 1 << 29
"""Float32 probabilities of a step's drafts, kept until they are verified: 1024 rows of 131072 tokens. vLLM's rejection
sampler holds four or five copies of as many rows while it verifies them."""


def rows_in(size: int, vocab_size: int) -> int:
    """Return how many float32 rows over the vocabulary fit into ``size`` bytes."""
    return size // (4 * vocab_size)


def drafts_allowed(runner: Any, requests: int, vocab_size: int) -> int:
    """Return how many drafts each of some requests may have, as far as memory is concerned.

    There is a limit only where the verification computes probabilities, or changes logits. That is judged by the step
    that has just been sampled.

    Args:
        runner: vLLM's model runner, in between its sampling and the next step.
        requests: that draft.
        vocab_size: columns of a row.
    """
    if sampling.decides_by_argmax(runner.rejection_sampler, runner.input_batch.sampling_metadata):
        return registration.max_draft_tokens()
    return drafts_per_request(requests, vocab_size)


def drafts_per_request(requests: int, vocab_size: int) -> int:
    """Return how many drafts each request may have in a step whose verification computes probabilities; perhaps none.

    Drafts are shared out evenly, and without regard to what was drawn, so the text's distribution stays what it is.
    """
    return rows_in(DRAWN_BYTES, vocab_size) // max(1, requests)


class ProfiledDraft(DraftChoice):
    """Takes the memory that :class:`DraftChoice` does, and does not depend on a request."""

    def __init__(self) -> None:
        self.probs = None

    def choose(self, logits: Tensor, *_: Any) -> Tensor:
        """Return the most probable tokens, int64 ``[positions]``, of logits that may be anything."""
        self.probs = logits.clone().softmax(-1)
        return self.probs.cumsum(-1, dtype=torch.float64).argmax(-1)


@contextlib.contextmanager
def profiling_drafts(runner: Any, drafts: int) -> Iterator[None]:
    """Let vLLM's profiling run use as much memory as serving with drafts can.

    vLLM profiles neither a ``custom_class`` proposer nor a verification of more than one draft per request.

    Args:
        runner: vLLM's model runner, its proposer attached.
        drafts: the most that a request may have.
    """
    sampler, profile_run, verify = runner.rejection_sampler, runner.profile_run, runner.rejection_sampler.forward

    def verify_most(metadata: Any, probs: Any, logits: Tensor, sampling_metadata: Any) -> Any:
        requests, vocab_size = len(metadata.num_draft_tokens), logits.shape[-1]
        each = max(1, min(drafts, drafts_per_request(requests, vocab_size)))
        most = type(metadata).make_dummy([[0] * each] * requests, logits.device)
        kept = torch.full((requests * each, vocab_size), 1 / vocab_size, device=logits.device)
        return verify(most, kept.clone(), logits.new_zeros(len(kept) + requests, vocab_size), sampling_metadata)

    def profile_with_drafts(*args: Any, **kwargs: Any) -> None:
        profile_run(*args, **kwargs)
        runner.drafter.profile()
        runner._sync_device()

    sampler.forward, runner.profile_run = verify_most, profile_with_drafts
    try:
        yield
    finally:
        sampler.forward = verify
        del runner.profile_run
