"""Whether drafting pays for a number of requests: both ways are tried while serving, and the faster one is taken.

For vLLM's second runner. Its scheduler plans ahead of the results and cannot ask the workers for prices, which are in
other processes. But it sees when steps end and how many tokens they yield. The slower way is tried again from time to
time, because texts change, and with them how many drafts are accepted.

The first runner tries branches in the same way: their prices leave out what planning them takes, and what follows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

STEPS = 16
"""Steps of a trial; they need not follow one another."""
GLIMPSE, FAR = 4, 3.0
"""Four steps are enough if one way yields three times as many tokens a second as the other."""
PATIENCE = 4
"""The worse way is given up after this many times the steps of a trial, if too few of them could be measured."""
AGAIN = 250
"""Steps after which the worse way is tried again."""
CLEARLY, LATER = 1.5, 4
"""With a way that yields so many times as much as the other, the other is tried so many times more rarely."""


@dataclass
class _Trial:
    """What was measured of a way so far."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    slowest: tuple[float, int] = 0.0, 0

    def add(self, tokens: int, seconds: float) -> None:
        """Take in a step."""
        self.steps, self.tokens, self.seconds = self.steps + 1, self.tokens + tokens, self.seconds + seconds
        self.slowest = max(self.slowest, (seconds, tokens))

    @property
    def found(self) -> float | None:
        """Tokens a second without the slowest step, in which a kernel may have been compiled; None for no time."""
        seconds = self.seconds - self.slowest[0]
        return (self.tokens - self.slowest[1]) / seconds if seconds > 0 else None


@dataclass
class _Yields:
    """Tokens a second by way (drafting or not), and what is being measured.

    Attributes:
        since: steps since the worse way was tried; less than 0 if that found nothing.
        tried: steps in which it is being tried.
        again: steps after which it is tried again.
        first: the way that is taken until it is known. Before that, ``glimpses`` allows four steps of the other.
        steps: of a trial.
        margin: the other way has to yield more than this times what the first one yields.
        glimpses: whether four steps may be enough.
    """

    again: int
    first: bool
    steps: int
    margin: float
    glimpses: bool
    of: dict[bool, float] = field(default_factory=dict)
    trials: dict[bool, _Trial] = field(default_factory=lambda: {True: _Trial(), False: _Trial()})
    since: int = 0
    tried: int = 0

    def __post_init__(self) -> None:
        self.since = self.again * LATER

    @property
    def better(self) -> bool:
        """The way that yields more, as far as known."""
        if len(self.of) < 2 or self.of[not self.first] <= self.margin * self.of[self.first]:
            return self.first
        return not self.first

    def choose(self) -> bool:
        """Return the way of a step to come."""
        if self._first_is_due() or self.since < self._wait():
            return self.better
        self.tried += 1
        if self.tried > PATIENCE * self.steps:
            self.since, self.tried = -self.again * LATER, 0
            return self.better
        return not self.better

    def _first_is_due(self) -> bool:
        """Whether more of the first way is wanted, before or after a glimpse of the other."""
        if self.first in self.of:
            return False
        if not self.glimpses:
            return True
        return self.trials[self.first].steps < GLIMPSE or self.trials[not self.first].steps >= GLIMPSE

    def _wait(self) -> int:
        known = self.of.get(not self.better)
        return self.again * (LATER if known is not None and self.of[self.better] > CLEARLY * known else 1)

    def measured(self, way: bool, tokens: int, seconds: float) -> None:
        """Take in the step of a way."""
        trial = self.trials[way]
        trial.add(tokens, seconds)
        found, other = trial.found, self._known(not way)
        if found is None:
            return
        far = self.glimpses and trial.steps == GLIMPSE and other is not None and not other / FAR < found < other * FAR
        if trial.steps < self.steps and not far:
            return
        if way != self.better:
            self.since = self.tried = 0
        if far and other is not None and (not way) not in self.of:
            self._take(not way, other)
        self._take(way, found)

    def _take(self, way: bool, found: float) -> None:
        """Take in what a trial found, which is over."""
        self.of[way] = (self.of.get(way, found) + found) / 2
        self.trials[way] = _Trial()

    def _known(self, way: bool) -> float | None:
        """Return a way's tokens a second, by a glimpse if its first trial is not over; None without one."""
        if way not in self.of and self.trials[way].steps >= GLIMPSE:
            return self.trials[way].found
        return self.of.get(way)


class Trials:
    """Decides between drafting and AR by numbers of requests, in powers of two.

    Args:
        clock: seconds.
        again: steps after which the worse way is tried again.
        first: the way that is taken until it is measured; the other is then tried for a bounded number of steps.
        steps: of a trial. What a few steps yield is mostly chance.
        margin: the other way has to yield more than this times what the first one yields.
        glimpses: whether four steps of each way come first, and decide where one yields many times as much.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        again: int = AGAIN,
        first: bool = True,
        steps: int = STEPS,
        margin: float = 1.0,
        glimpses: bool = True,
    ) -> None:
        self._clock = clock
        self._settings = again, first, steps, margin, glimpses
        self._yields: dict[int, _Yields] = {}
        self._last: tuple[int, bool] | None = None
        self._ended = 0.0

    def drafts(self, requests: int) -> bool:
        """Whether requests in auto mode should draft after the next step, of so many requests."""
        return self._of(requests).choose()

    def saw(self, requests: int, drafted: bool, tokens: int, comparable: bool) -> None:
        """Take in that a step has ended. It is measured if the step before was of its way, too.

        Args:
            requests: for which :meth:`drafts` was asked.
            drafted: whether they verified drafts.
            tokens: that they yielded.
            comparable: whether that holds of all of them, and none was at its prompt.
        """
        now, yields = self._clock(), self._of(requests)
        way = (requests.bit_length(), drafted) if comparable else None
        if way is not None and way == self._last:
            yields.measured(drafted, tokens, now - self._ended)
        yields.since += 1
        self._last, self._ended = way, now

    def _of(self, requests: int) -> _Yields:
        power = requests.bit_length()
        if power not in self._yields:
            self._yields[power] = _Yields(*self._settings)
        return self._yields[power]
