"""vLLM's padding of a step, kept out of what this extension runs.

vLLM pads a request that comes with one token to compute, after a cached prompt or a preemption, by drafts of -1
(``Scheduler.schedule``), so that steps have one size for CUDA graphs; steps of this extension are ragged. Padding would
have the request sampled by rejecting, with other random numbers than without, takes pages and budget from others, and
keeps the request out of the engine where the budget is smaller than a block.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from vllm_nld.errors import NLDError
from vllm_nld.vllm_glue.versions import FIXED_BITMASK_ROWS, SUPPORTED, installed_release


def schedule_unpadded(scheduler: Any, schedule: Callable[[], Any]) -> Any:
    """Return the ``SchedulerOutput`` of ``schedule()``, planned without padding.

    Raises:
        NLDError: the scheduler has no ``num_spec_tokens``, by which it pads.
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
    """Return how many drafts of -1 requests were padded with."""
    drafted = scheduler_output.scheduled_spec_decode_tokens
    return {request_id: len(ids) for request_id, ids in drafted.items() if -1 in ids}


def without_padding(scheduler_output: Any) -> Any:
    """Return a ``SchedulerOutput`` whose requests run only their own tokens, where another scheduler pads.

    0.32's CPU kernels even take a draft of -1 for an index. The scheduler's own copy is left as it is: it takes the
    padding back as rejected drafts. What it sends with the step goes through :func:`grammar_without_padding`.
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
    """Return a ``GrammarOutput`` without the rows of padding, of a step that ran by :func:`without_padding`.

    The runner finds a request's rows in one of two ways (``v1/structured_output/utils.py: apply_grammar_bitmask``).
    Up to vLLM 0.32 it counts the drafts of the requests before, so rows of padding must go. From 0.33 on, every request
    has as many rows as the longest block takes, of which the first ones are read, so none may go.

    Args:
        grammar_output: the scheduler's; its bitmask is int32 ``[rows, words]``, a row for every draft of a request
            with a grammar and one more for the token after them. None where no request has a grammar.
        scheduler_output: the step as the scheduler made it.
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
