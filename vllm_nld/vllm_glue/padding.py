"""Keeps vLLM's padding out of the steps that this extension runs.

If a request has one token to compute, after a cached prompt or a preemption, vLLM pads it with drafts of -1
(``Scheduler.schedule``), so that steps have one size for CUDA graphs. Steps of this extension have no fixed size. With
padding, the request would be sampled by rejection, with other random numbers. Padding also takes pages and budget from
other requests, and keeps the request out of the engine if the budget is smaller than a block.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from vllm_nld.errors import NLDError
from vllm_nld.vllm_glue.versions import FIXED_BITMASK_ROWS, SUPPORTED, installed_release


def schedule_unpadded(scheduler: Any, schedule: Callable[[], Any]) -> Any:
    """Return the ``SchedulerOutput`` of ``schedule()``, without padding.

    Raises:
        NLDError: the scheduler has no ``num_spec_tokens``, which controls the padding.
    """
    if not hasattr(scheduler, "num_spec_tokens"):
        raise NLDError(f"this vLLM's Scheduler has no 'num_spec_tokens'; vllm-nld supports vLLM {SUPPORTED}")
    drafts, scheduler.num_spec_tokens = scheduler.num_spec_tokens, 0
    try:
        output = schedule()
    finally:
        scheduler.num_spec_tokens = drafts
    if hasattr(output, "num_spec_tokens_to_schedule"):
        output.num_spec_tokens_to_schedule = drafts
    return output


def _padded(scheduler_output: Any) -> dict[str, int]:
    """Return the number of drafts of -1 that each request was padded with."""
    drafted = scheduler_output.scheduled_spec_decode_tokens
    return {request_id: len(ids) for request_id, ids in drafted.items() if -1 in ids}


def without_padding(scheduler_output: Any) -> Any:
    """Return a ``SchedulerOutput`` whose requests run only their own tokens, if another scheduler padded them.

    The CPU kernels of vLLM 0.32 even use a draft of -1 as an index. The scheduler's own copy is not changed, because
    the scheduler later counts the padding as rejected drafts. The grammar that it sends with the step goes through
    :func:`grammar_without_padding`.
    """
    padded = _padded(scheduler_output)
    if not padded:
        return scheduler_output
    own = copy.copy(scheduler_output)
    drafted = scheduler_output.scheduled_spec_decode_tokens
    own.scheduled_spec_decode_tokens = {name: ids for name, ids in drafted.items() if name not in padded}
    scheduled = scheduler_output.num_scheduled_tokens
    own.num_scheduled_tokens = {name: count - padded.get(name, 0) for name, count in scheduled.items()}
    own.total_num_scheduled_tokens -= sum(padded.values())
    return own


def grammar_without_padding(grammar_output: Any, scheduler_output: Any) -> Any:
    """Return a ``GrammarOutput`` without the rows of padding, for a step that went through :func:`without_padding`.

    The runner finds a request's rows in one of two ways (``v1/structured_output/utils.py: apply_grammar_bitmask``).
    Up to vLLM 0.32 it counts the drafts of the requests before, so rows of padding must go. From 0.33 on, every request
    has as many rows as the longest block takes, of which the first ones are read, so none may go.

    Args:
        grammar_output: from the scheduler. Its bitmask is int32 ``[rows, words]``, with a row for every draft of a
            request with a grammar and one more for the token after them. None if no request has a grammar.
        scheduler_output: the step from the scheduler.
    """
    if installed_release() >= FIXED_BITMASK_ROWS:
        return grammar_output
    padded = _padded(scheduler_output)
    if grammar_output is None or not any(name in padded for name in grammar_output.structured_output_request_ids):
        return grammar_output
    kept: list[int] = []
    first = 0
    for name in grammar_output.structured_output_request_ids:
        rows = 1 + len(scheduler_output.scheduled_spec_decode_tokens.get(name, ()))
        kept += range(first, first + (1 if name in padded else rows))
        first += rows
    own = copy.copy(grammar_output)
    own.grammar_bitmask = grammar_output.grammar_bitmask[kept]
    return own
