"""The one exception type of this package: how it quotes the user's values, and how it is shown on the command line."""

from __future__ import annotations

import reprlib
import sys
from types import TracebackType

LONGEST_VALUE = 200
"""Characters of a value that a message shows."""
LONGEST_MESSAGE = 2000


class NLDError(ValueError):
    """Something that the user can fix: a wrong option, an unsuitable checkpoint, an unsupported combination.

    The message is one line of printable text, at most ``LONGEST_MESSAGE`` characters long: it may be written to a log
    or an HTTP response, and the values that it quotes may come from any client.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_cut(_printable(message), LONGEST_MESSAGE))


def shown(value: object) -> str:
    """Return a value as a message shows it: its ``repr``, shortened in the middle if it is long.

    Works for any value: nested deeper than ``repr`` can follow, an integer with more digits than Python prints, an
    object whose ``repr`` fails.
    """
    return _cut(_printable(_SHORT.repr(value)), LONGEST_VALUE)


def shown_key(key: object) -> str:
    """Return a key as a message shows it: like :func:`shown`, without the quotes of a string."""
    return shown(key)[1:-1] if isinstance(key, str) else shown(key)


class _Short(reprlib.Repr):
    """``repr`` that looks at only the beginning and the end of long values."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxstring = self.maxother = self.maxlong = LONGEST_VALUE
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 20

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > 4 * LONGEST_VALUE:
            return f"<integer of {x.bit_length()} bits>"
        return repr(x)


_SHORT = _Short()


def _printable(text: str) -> str:
    """Escape characters that would break the line, or that no encoding can write (half a surrogate pair)."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _cut(text: str, longest: int) -> str:
    """Remove the middle of a text that is too long."""
    if len(text) <= longest:
        return text
    end = longest // 3
    return f"{text[: longest - end - 3]}...{text[-end:]}"


def show_plainly() -> None:
    """Print an uncaught :class:`NLDError` as one line instead of a traceback; other exceptions are shown as usual.

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
    """Return the :class:`NLDError` in ``error``: itself, its cause or context, or one that pydantic wrapped."""
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
