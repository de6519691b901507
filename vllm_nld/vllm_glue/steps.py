"""Data that vLLM's scheduler and workers exchange, and how to inspect a step."""

from __future__ import annotations

import copy
from typing import Any

from vllm_nld.errors import NLDError
from vllm_nld.vllm_glue.versions import SUPPORTED


def with_note(carrier: Any, note: Any) -> Any:
    """Return a copy of a ``SchedulerOutput`` or ``ModelRunnerOutput`` that carries a note of this extension.

    Both are plain dataclasses that vLLM pickles if scheduler and worker are different processes, so an extra attribute
    is sent along. A copy, because the ``ModelRunnerOutput`` of empty steps is one shared object.

    Raises:
        NLDError: the object accepts no attributes.
    """
    noted = copy.copy(carrier)
    try:
        noted.nld_note = note
    except AttributeError as error:
        raise NLDError(
            f"this vLLM's {type(carrier).__name__} takes no attributes; vllm-nld supports vLLM {SUPPORTED}"
        ) from error
    return noted


def note_on(carrier: Any) -> Any:
    """Return the note that :func:`with_note` put on an object, or None."""
    return getattr(carrier, "nld_note", None)


def draft_token_ids(drafts: dict[str, list[int]]) -> Any:
    """Return vLLM's ``DraftTokenIds`` of some requests."""
    from vllm.v1.outputs import DraftTokenIds

    return DraftTokenIds(list(drafts), list(drafts.values()))
