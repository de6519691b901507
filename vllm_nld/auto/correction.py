"""What auto mode's expectations turn out to be worth."""

from __future__ import annotations

import math

REMEMBERED_DRAFTS = 1000.0
"""Expected drafts that the correction of gain remembers: what a block yields varies as much as it is, so that fewer
would tell little."""
TIME_WEIGHT = 0.03
"""Weight of a step in the corrections of time."""
SLOWEST = 2.0
"""A step that took a larger multiple of its price was disturbed, and counts as this."""
FORGET = 0.002
"""Share of a correction that a choice of AR takes back."""


class Correction:
    """How far drafting fell short of what was expected, at a number of requests.

    Ratios of sums, for a mean of ratios would be off: a few blocks in which nearly all drafts are accepted make up for
    many poor ones, and cut to size they no longer do.

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
        """Take in what one cycle yielded, what it was expected to yield, and its time relative to the expected one."""
        keep = math.exp(-expected / REMEMBERED_DRAFTS)
        self._accepted = keep * self._accepted + accepted
        self._expected = keep * self._expected + expected
        self.seconds += TIME_WEIGHT * (min(slowness, SLOWEST) - self.seconds)

    def observe_plain(self, slowness: float) -> None:
        """Take in what a step without drafts took, relative to what was expected."""
        self.plain += TIME_WEIGHT * (min(slowness, SLOWEST) - self.plain)

    def forget(self) -> None:
        """Trust the expectations a little more again: nothing is learned while nobody drafts."""
        self._accepted += FORGET * (self._expected - self._accepted)
        self.seconds += FORGET * (1 - self.seconds)
