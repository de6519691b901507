"""Verification of a step whose requests are all greedy, straight from the logits.

vLLM's rejection sampler copies all logits to float32, passes the copy through its processors, and takes the argmax. If
nothing can change a logit (:func:`vllm_nld.vllm_glue.sampling.decides_by_argmax`), one pass over the logits gives the
same result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_nld import ops

PLACEHOLDER = -1
"""Fills a row after its last sampled token (vLLM's ``PLACEHOLDER_TOKEN_ID``)."""


def readable(logits: Tensor) -> bool:
    """Whether :func:`verify_greedily` takes such logits: logits computed by our model always qualify."""
    return logits.dtype in (torch.float32, torch.bfloat16, torch.float16) and logits.stride(-1) == 1


def verify_greedily(metadata: Any, logits: Tensor) -> Tensor:
    """Return every request's accepted drafts and the verifier's token after them, as vLLM's rejection sampler does.

    Never waits for a device.

    Args:
        metadata: vLLM's ``SpecDecodeMetadata``, of R requests with N drafts in all.
        logits: float32, bfloat16 or float16 ``[N + R, vocab]``, inner stride 1; the metadata gives the request of each
            row.

    Returns:
        int32 ``[R, max_spec_len + 1]``, ``PLACEHOLDER`` after the end of a row.
    """
    device = logits.device
    best, _, _ = ops.function("best_tokens", device.type)(logits, False)
    starts = torch.nn.functional.pad(metadata.cu_num_draft_tokens, (1, 0)).int()
    targets = best[_rows_of_logits(metadata, starts)]
    accepted, tokens, token_starts, _ = ops.function("accept_prefix", device.type)(
        metadata.draft_token_ids.long(), targets, starts
    )
    columns = torch.arange(metadata.max_spec_len + 1, device=device)
    places = (token_starts[:-1, None] + columns).clamp_max(len(tokens) - 1)
    sampled: Tensor = tokens[places].masked_fill(columns > accepted[:, None], PLACEHOLDER).int()
    return sampled


def _rows_of_logits(metadata: Any, starts: Tensor) -> Tensor:
    """Return the row of logits for each place in accept_prefix's ``targets``, int64 ``[N + R]``.

    Args:
        metadata: vLLM's ``SpecDecodeMetadata``.
        starts: int32 ``[R + 1]``, where each request's drafts begin.
    """
    drafts, requests = len(metadata.draft_token_ids), len(starts) - 1
    place = torch.arange(drafts, device=starts.device)
    request_of_draft = torch.searchsorted(starts[1:].long(), place, right=True)
    rows = place.new_empty(drafts + requests)
    rows[place + request_of_draft] = metadata.target_logits_indices.long()
    rows[starts[1:] + torch.arange(requests, device=starts.device)] = metadata.bonus_logits_indices.long()
    return rows
