"""The one exception type of this package, and how a command-line user gets to see it."""

from __future__ import annotations

import sys
from types import TracebackType


class NLDError(ValueError):
    """Something the user can mend: a wrong option, an unsuitable checkpoint, an unsupported combination."""


def show_plainly() -> None:
    """Print an uncaught :class:`NLDError` as one line instead of a traceback; every other exception is untouched.

    vLLM re-raises configuration errors through several layers, so the line would otherwise drown in their frames.
    """
    previous = sys.excepthook
    if getattr(previous, "shows_nld_errors", False):
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        found = find(error)
        if found is None:
            previous(kind, error, trace)
        else:
            print(f"vllm-nld: error: {found}", file=sys.stderr)

    hook.shows_nld_errors = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def find(error: BaseException | None) -> NLDError | None:
    """Return the :class:`NLDError` behind ``error``: itself, its cause or context, or what pydantic wrapped."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, NLDError):
            return error
        seen.add(id(error))
        wrapped = [item.get("ctx", {}).get("error") for item in getattr(error, "errors", list)()]
        inner = next((item for item in wrapped if isinstance(item, NLDError)), None)
        if inner is not None:
            return inner
        error = error.__cause__ or error.__context__
    return None
