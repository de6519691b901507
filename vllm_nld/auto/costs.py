"""What steps cost on this machine, in seconds: measured at start-up, and again with every step."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable
from itertools import accumulate
from statistics import median_low

from vllm_nld.ops.sizes import round_size

RECENT = 15
"""Measurements of one size whose median is its price, so that one page fault or one compilation does not count."""

KNOWN = 4
"""Measurements from which on they are believed, and the first guess is not."""


class CostCurve:
    """Seconds of a forward as a function of its size, by interpolation between the sizes that were measured.

    Start-up measures bare forwards, which know nothing of host time. So sizes that no step has had yet are priced by
    that guess plus what steps of other sizes took beyond theirs.
    """

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._guesses: dict[int, float] = {}
        self._recent: dict[int, deque[float]] = {}
        self._prices: dict[int, float] = {}
        self._answers: dict[int, float] = {}
        self._ceilings: list[float] | None = None
        self.samples: dict[int, int] = {}

    @staticmethod
    def bucket(size: int) -> int:
        """Round a size so that few buckets are kept: exact up to 8, then to within about 12 %."""
        step = max(1, 1 << max(0, size.bit_length() - 4))
        return -(-size // step) * step

    def start(self, size: int, seconds: float) -> None:
        """Set a first guess. It counts as one sample, so that a first measurement that includes compilation does not
        simply replace it.
        """
        bucket = self.bucket(size)
        self._guesses[bucket] = seconds
        self._price(bucket, 0.0)

    def observe(self, size: int, seconds: float) -> None:
        """Take a measurement in: the price is the median of recent ones, the lower one of two."""
        bucket = self.bucket(size)
        self.samples[bucket] = self.samples.get(bucket, 0) + 1
        self._recent.setdefault(bucket, deque(maxlen=RECENT)).append(seconds)
        self._price(bucket, 0.0)
        if self.samples[bucket] <= KNOWN or self.samples[bucket] % RECENT == 0:
            self._price_guesses()

    def seconds(self, size: int) -> float:
        """Return the expected seconds; 0 if nothing was ever measured.

        At most what a larger size was seen to take: an overestimate would keep this size from being used, and so would
        never be corrected.
        """
        if not self._sizes or size <= 0:
            return 0.0
        bucket = self.bucket(size)
        answer = self._answers.get(bucket)  # one choice asks for the same few sizes many times
        if answer is None:
            answer = self._answers[bucket] = min(self._interpolated(bucket), self.ceiling(size))
        return answer

    def ceiling(self, size: int) -> float:
        """Return the least that this size or a larger one was seen to take; infinity if none was."""
        if self._ceilings is None:
            known = (self._prices[other] if self.is_known(other) else math.inf for other in reversed(self._sizes))
            self._ceilings = [*accumulate(known, min)]
        larger = len(self._sizes) - bisect_left(self._sizes, self.bucket(size))
        return self._ceilings[larger - 1] if larger else math.inf

    def is_known(self, bucket: int) -> bool:
        """Whether a bucket's price comes from measurements, and not from a guess."""
        return self.samples.get(bucket, 0) >= KNOWN

    def _price_guesses(self) -> None:
        """Price the sizes that are not known by their guess, and what known ones take beyond theirs."""
        known = [bucket for bucket in self._guesses if self.is_known(bucket)]
        if known:
            beyond = median_low(self._prices[bucket] - self._guesses[bucket] for bucket in known)
            for bucket in self._guesses.keys() - set(known):
                self._price(bucket, beyond)

    def _price(self, bucket: int, beyond: float) -> None:
        if bucket not in self._prices:
            insort(self._sizes, bucket)
        self._answers.clear()
        self._ceilings = None
        recent = list(self._recent.get(bucket, ()))
        if bucket in self._guesses and not self.is_known(bucket):
            recent.append(max(0.0, self._guesses[bucket] + beyond))
        self._prices[bucket] = median_low(recent)

    def _interpolated(self, bucket: int) -> float:
        place = bisect_left(self._sizes, bucket)
        if place < len(self._sizes) and self._sizes[place] == bucket:
            return self._prices[bucket]
        if place == 0:
            return self._prices[self._sizes[0]]
        if place == len(self._sizes):
            # A forward at least as large costs at most in proportion.
            last = self._sizes[-1]
            return self._prices[last] * bucket / last
        low, high = self._sizes[place - 1], self._sizes[place]
        share = (bucket - low) / (high - low)
        return self._prices[low] * (1 - share) + self._prices[high] * share


class Costs:
    """The prices of auto mode.

    Attributes:
        ar: a step in which every request gets one token, by requests.
        verify: a step with drafts in it, by tokens of the causal pass.
        draft: filling blocks by one forward, by tokens of the blocks.
        branched: a step with branches in it, by tokens of the causal pass and of the branches.
    """

    def __init__(self) -> None:
        self.ar, self.verify, self.draft, self.branched = CostCurve(), CostCurve(), CostCurve(), CostCurve()

    def start(self, size: int, forward_seconds: float) -> None:
        """Take in a start-up measurement: one forward over ``size`` tokens.

        The passes run the same weights, so they start out equal; real steps soon tell them apart.
        """
        for curve in (self.ar, self.verify, self.draft, self.branched):
            curve.start(size, forward_seconds)

    def measure(self, forward: Callable[[int], float], largest: int, go_on: Callable[[], bool]) -> None:
        """Time forwards of growing size, at start-up.

        Args:
            forward: runs one over so many tokens, and returns its seconds.
            largest: size to measure.
            go_on: asked before every size.
        """
        size = 4
        while size <= largest and go_on():
            self.start(size, min(forward(size) for _ in range(3)))  # the first one compiles kernels
            size = round_size(size + 1)
