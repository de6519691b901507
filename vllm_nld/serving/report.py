"""What a request that asks for it (``nld.report``) is told: how each of its tokens came, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vllm_nld.origins import UNKNOWN, WORDS
from vllm_nld.serving.ledger import Tally

INCOMPLETE = "\ufffd"
"""What a tokenizer makes of bytes that are not a whole character yet."""


def report(origins: str, tally: Tally) -> dict[str, Any]:
    """Return a request's report so far, as it goes from the engine to the API process: all of it, every time.

    There it may be merged with, or replaced by, the next one.
    """
    return {
        "origins": origins,
        "forwards": dict(tally.forwards),
        "verified_blocks": tally.blocks["self_speculation"],
        "accepted_drafts": tally.accepted["self_speculation"],
    }


class Pieces:
    """Cuts a text into the pieces that its tokens stand for. Together they are the text.

    Args:
        decode: text of token ids.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._start = self._read = 0

    def next(self, token: int) -> str:
        """Return what a further token adds: nothing, if it has no text or ends within a character."""
        self._ids.append(token)
        before, now = (self._decode(self._ids[self._start : end]) for end in (self._read, len(self._ids)))
        if now.endswith(INCOMPLETE) or len(now) <= len(before):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return now[len(before) :]


class Account:
    """What a response has said so far, and what it says next.

    Args:
        decode: as for :class:`Pieces`.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._pieces = Pieces(decode)
        self._told = 0
        self._known: dict[str, Any] = {"origins": ""}

    def next(self, tokens: Sequence[int], known: dict[str, Any] | None) -> dict[str, Any]:
        """Return the part of the report that goes with further tokens.

        Args:
            tokens: those that the response has now, and did not have before.
            known: the engine's report so far; None: it sent no other.

        Returns:
            ``tokens``: each one's ``id``, ``text`` and ``origin``; and what the request took so far: ``forwards`` by
            kind, ``verified_blocks`` and ``accepted_drafts``, of self-speculation, and ``tokens_per_forward`` and
            ``acceptance_length``, None before the first forward or block.
        """
        self._known = known or self._known
        origins = self._known["origins"][self._told :].ljust(len(tokens), UNKNOWN)
        self._told += len(tokens)
        told = [
            {"id": token, "text": self._pieces.next(token), "origin": WORDS[origin]}
            for token, origin in zip(tokens, origins, strict=False)
        ]
        return {"tokens": told, **self._figures()}

    def _figures(self) -> dict[str, Any]:
        forwards = self._known.get("forwards", {})
        decoding = sum(count for kind, count in forwards.items() if kind != "prefill")
        blocks, accepted = self._known.get("verified_blocks", 0), self._known.get("accepted_drafts", 0)
        return {
            "forwards": forwards,
            "verified_blocks": blocks,
            "accepted_drafts": accepted,
            "tokens_per_forward": self._told / decoding if decoding else None,
            "acceptance_length": 1 + accepted / blocks if blocks else None,
        }
