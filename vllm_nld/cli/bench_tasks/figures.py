"""What some requests took and yielded, as sums that add up, and the ratios of them that are shown."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

ALL = "all"
"""In place of a category: all of them together."""
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Figures:
    """Sums over some requests of one way.

    Attributes:
        way: how they were decoded.
        category: of their prompts, or ``all``.
        concurrency: requests in flight.
        requests: how many.
        tokens: generated.
        forwards: decode forwards, each counted once for every request in it; prefills are left out.
        drafts: verified blocks, or vLLM's count of proposals.
        accepted: drafts accepted at each position, the first next to the seed.
        seconds: on the clock.
        cpu_seconds: of all of this process's threads.
        user_rates: sum over requests of the tokens a second that its user saw.
        same: requests with AR's text.
        agreement: sum over requests of the share of AR's text before the first token that differs.
        checked: requests whose answer can be checked.
        right: of these, those that are right.
    """

    way: str
    category: str
    concurrency: int
    requests: int
    tokens: int
    forwards: int
    drafts: int
    accepted: tuple[int, ...]
    seconds: float
    cpu_seconds: float
    user_rates: float
    same: int
    agreement: float
    checked: int = 0
    right: int = 0

    def row(self, ar: Figures | None) -> dict[str, Any]:
        """Return the figures as a report shows them; ``ar`` is AR with the same requests, for the speed-up."""

        def ratio(part: float, whole: float) -> float | None:
            return round(part / whole, 3) if whole else None

        speed = ratio(self.tokens, self.seconds)
        return {
            "way": self.way,
            "category": self.category,
            "concurrency": self.concurrency,
            "requests": self.requests,
            "tokens": self.tokens,
            "tpf": ratio(self.tokens, self.forwards),
            "acceptance_length": round(1 + sum(self.accepted) / self.drafts, 3) if self.drafts else None,
            "accepted_by_position": [round(count / self.drafts, 4) for count in self.accepted] if self.drafts else [],
            "agreement": ratio(self.agreement, self.requests),
            "same_text": self.same,
            "accuracy": ratio(self.right, self.checked),
            "checked": self.checked,
            "tokens_per_s": speed,
            "tokens_per_s_per_user": ratio(self.user_rates, self.requests),
            "speed_up": ratio(self.tokens / self.seconds, ar.tokens / ar.seconds) if ar else None,
            "cpu_speed_up": ratio(self.tokens / self.cpu_seconds, ar.tokens / ar.cpu_seconds) if ar else None,
        }


def total(figures: Iterable[Figures]) -> Figures:
    """Return the sum of what one way did in several categories, one after another."""
    first, *others = figures
    found = first
    for other in others:
        length = max(len(found.accepted), len(other.accepted))
        both = zip(_padded(found.accepted, length), _padded(other.accepted, length), strict=True)
        sums = {name: getattr(found, name) + getattr(other, name) for name in SUMS}
        found = replace(found, accepted=tuple(map(sum, both)), **sums)
    return replace(found, category=ALL)


SUMS = (
    "requests", "tokens", "forwards", "drafts", "seconds", "cpu_seconds", "user_rates",
    "same", "agreement", "checked", "right",
)  # fmt: skip


def _padded(counts: tuple[int, ...], length: int) -> tuple[int, ...]:
    return counts + (0,) * (length - len(counts))


def agreeing_share(tokens: list[int], expected: list[int]) -> float:
    """Return the share of a text before the first token that differs, of the longer of the two."""
    longer = max(len(tokens), len(expected))
    same = next((i for i, pair in enumerate(zip(tokens, expected, strict=False)) if pair[0] != pair[1]), None)
    return 1.0 if not longer else (min(len(tokens), len(expected)) if same is None else same) / longer


def is_right(text: str, answer: str) -> bool:
    """Whether the last number of a text is the answer, as GSM8K is scored."""
    numbers = NUMBER.findall(text)
    return bool(numbers) and number_in(numbers[-1]) == number_in(answer)


def number_in(text: str) -> float:
    """Return the number that a text is, with or without commas.

    Raises:
        ValueError: it is none.
    """
    return float(text.replace(",", ""))


def rows_of(figures: Iterable[Figures], baseline: str) -> list[dict[str, Any]]:
    """Return a row for each, and one over the categories of each way where there are several."""
    listed = list(figures)
    groups: dict[tuple[str, int], list[Figures]] = {}
    for own in listed:
        groups.setdefault((own.way, own.concurrency), []).append(own)
    listed += [total(group) for group in groups.values() if len(group) > 1]
    of_ar = {(own.category, own.concurrency): own for own in listed if own.way == baseline}
    return [own.row(of_ar.get((own.category, own.concurrency))) for own in listed]
