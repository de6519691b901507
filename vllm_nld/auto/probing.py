"""Probes: steps that are taken to learn something, not because they look best, within a share of the time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from vllm_nld.auto.candidates import ALL_AR, Candidate, Choice, assume_good
from vllm_nld.auto.search import Search

PROBE_SHARE = 0.01
"""Share of the time that may go into probes."""
PROBE_SAVINGS = 10.0
"""Upper bound on saved probe time, in seconds of work, so that an idle period cannot fund a burst of probes."""
FRESH_AR_SECONDS = 10.0
"""How old the price of an AR step may become before one is taken to see whether it still holds."""
AR_SAMPLES = 3
"""AR steps needed at a number of requests before their price is believed."""
PROBED_REQUESTS = 4
"""Requests that are probed together."""
PROBE_LENGTH = 8
"""Tokens of a probe's block."""
PROBE_EVERY = 64
"""Steps without a draft after which a request's acceptance counts as unknown."""


class Probe(NamedTuple):
    """A choice that is made to learn something, and the reason."""

    choice: Choice
    why: str


class Probing:
    """Decides on probes, and keeps their budget: what is saved, spent and affordable.

    Args:
        search: prices the probes.
        clock: seconds.
    """

    def __init__(self, search: Search, clock: Callable[[], float]) -> None:
        self._search = search
        self._clock = clock
        self._last_ar: dict[int, float] = {}
        self._dearest = 0.0
        self.saved = 0.0

    def due(self, candidates: Sequence[Candidate], requests: int, tokens: int, choice: Choice) -> Probe | None:
        """Return a probe instead of ``choice``, if one is due and affordable."""
        if choice.drafts and tokens == requests:
            costs = self._search.prices.costs.ar
            bucket = costs.bucket(requests)
            if costs.samples.get(bucket, 0) < AR_SAMPLES:
                return Probe(ALL_AR, "AR's price is unknown")
            stale = self._clock() - self._last_ar.get(bucket, 0.0) > FRESH_AR_SECONDS
            if stale and self._can_afford(costs.seconds(requests)):
                return Probe(ALL_AR, "AR's price is old")
        if choice.blocks:
            return None
        blocks = self._blocks(candidates, requests, tokens, choice)
        if not blocks:
            return None
        prices, given = self._search.prices, tokens + choice.tokens_at_hand
        extra = prices.cycle_seconds(given, sum(blocks.values()), len(blocks)) - prices.plain_seconds(requests, given)
        return Probe(Choice(blocks, choice.at_hand), "acceptance is unknown") if self._can_afford(extra) else None

    def _blocks(self, candidates: Sequence[Candidate], requests: int, tokens: int, choice: Choice) -> dict[int, int]:
        """Return blocks of the requests that did not draft for longest; none if even good drafts would not pay."""
        idle = [c for c in candidates if c.forward.idle_steps >= PROBE_EVERY and c.row not in choice.at_hand]
        if not idle:
            return {}
        floor = self._search.floor(requests, tokens)
        if not self._search.drafting(assume_good(idle), requests, tokens, tokens, floor, gain=1.0)[0]:
            return {}
        idle = sorted(idle, key=lambda candidate: -candidate.forward.idle_steps)[:PROBED_REQUESTS]
        length = min(PROBE_LENGTH, self._search.lengths[-1])
        return {candidate.row: min(length, candidate.forward.longest) for candidate in idle}

    def _can_afford(self, seconds: float) -> bool:
        """Whether the savings cover this estimate; what a probe really costs is charged when it is known."""
        self._dearest = max(seconds, 0.0)
        return self._dearest <= self.saved

    def save(self, seconds: float) -> None:
        """Put the share of some seconds of work aside."""
        limit = max(PROBE_SHARE * PROBE_SAVINGS, self._dearest)  # one probe of a slow machine may cost more
        self.saved = min(self.saved + PROBE_SHARE * seconds, limit)

    def saw_ar(self, requests: int) -> None:
        """Note that an AR step has just shown its price."""
        self._last_ar[self._search.prices.costs.ar.bucket(requests)] = self._clock()
