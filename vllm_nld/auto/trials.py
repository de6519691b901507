"""Whether drafting pays with so many requests, tried while serving: which way yields more tokens a second?

For vLLM's second runner. There the scheduler plans ahead of the results, and runs in another process than what could
measure prices. But it sees steps end. So it tries both ways, each for some steps, goes the better one, and tries the
other again from time to time: texts change, and with them how many drafts are accepted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

STEPS = 16
"""Steps of a trial."""
SETTLING = 2
"""Steps after a change that are not measured: they were planned before it, or overlap with such."""
AGAIN = 250
"""Steps after which the other way is tried again."""
CLEARLY, LATER = 1.5, 4
"""With a way that yields so many times as much as the other, the other is tried so many times more rarely."""


@dataclass
class _Yields:
    """Tokens a second by way (drafting or not), and steps since the worse one was tried."""

    of: dict[bool, float] = field(default_factory=dict)
    since: int = 0

    @property
    def better(self) -> bool:
        """The way that yields more; of both, when both are known."""
        return self.of[True] >= self.of[False]

    def choice(self) -> bool:
        if len(self.of) < 2:
            return True not in self.of
        clear = self.of[self.better] > CLEARLY * self.of[not self.better]
        return self.better if self.since < AGAIN * (LATER if clear else 1) else not self.better

    def take(self, way: bool, found: float) -> None:
        """Take in what a trial found."""
        tried_again = len(self.of) == 2 and way != self.better
        self.of[way] = (self.of.get(way, found) + found) / 2
        if tried_again or len(self.of) < 2:
            self.since = 0


class Trials:
    """Decides between drafting and AR by numbers of requests, in powers of two.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._yields: dict[int, _Yields] = {}
        self._way: tuple[int, bool] | None = None
        self._steps = self._tokens = 0
        self._began = 0.0

    def drafts(self, requests: int) -> bool:
        """Whether the next step's requests should draft."""
        return self._of(requests).choice()

    def saw(self, requests: int, drafted: bool, tokens: int, comparable: bool) -> None:
        """Take in that a step has ended.

        Args:
            requests: of the step.
            drafted: whether they verified drafts.
            tokens: that they yielded.
            comparable: whether that holds of all of them, and none was at its prompt.
        """
        way = (requests.bit_length(), drafted) if comparable else None
        if way is None or way != self._way:
            self._way, self._steps, self._tokens = way, -SETTLING, 0
            return
        yields = self._of(requests)
        yields.since += 1
        self._steps += 1
        if self._steps <= 0:
            self._began = self._clock()
            return
        self._tokens += tokens
        if self._steps == STEPS:
            now = self._clock()
            if now > self._began:
                yields.take(drafted, self._tokens / (now - self._began))
            self._began, self._steps, self._tokens = now, 0, 0

    def _of(self, requests: int) -> _Yields:
        return self._yields.setdefault(requests.bit_length(), _Yields())
