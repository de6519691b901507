"""How far what auto mode expected came true."""

from __future__ import annotations

import math

REMEMBERED_DRAFTS = 1000.0
"""Memory of the gain, in expected drafts. The yield of a block has a standard deviation about as large as its mean, so
a shorter memory would be mostly noise."""
TIME_WEIGHT = 0.03
"""Weight of a step in the ratios of time."""
SLOWEST = 2.0
"""A step that took a larger multiple of its price was disturbed, and counts as this."""
FORGET = 0.002
"""How much of the way back to 1 a choice of AR takes a ratio."""


class ExpectedVsActual:
    """How far drafting fell short of what was expected, at a number of requests.

    We divide sums rather than average ratios. Acceptance has a long tail, and clipping each ratio would hide the few
    long runs that pay for the many short ones.

    Attributes:
        seconds: time of a cycle, as a multiple of the one expected.
        plain: time of a step without drafts, likewise: prices are medians, and the mean of either is higher.
    """

    def __init__(self) -> None:
        self._accepted = self._expected = REMEMBERED_DRAFTS
        self.seconds = self.plain = 1.0

    @property
    def gain(self) -> float:
        """Accepted drafts, as a share of those expected."""
        return self._accepted / self._expected

    def observe(self, accepted: float, expected: float, slowness: float) -> None:
        """Learn from one cycle: what it yielded, what was expected, and its time relative to the expected time."""
        keep = math.exp(-expected / REMEMBERED_DRAFTS)
        self._accepted = keep * self._accepted + accepted
        self._expected = keep * self._expected + expected
        self.seconds += TIME_WEIGHT * (min(slowness, SLOWEST) - self.seconds)

    def observe_plain(self, slowness: float) -> None:
        """Learn from a step without drafts: its time relative to the expected time."""
        self.plain += TIME_WEIGHT * (min(slowness, SLOWEST) - self.plain)

    def forget(self) -> None:
        """Move back toward 1: nothing is learned while no request drafts."""
        self._accepted += FORGET * (self._expected - self._accepted)
        self.seconds += FORGET * (1 - self.seconds)
