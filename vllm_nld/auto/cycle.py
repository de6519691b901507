"""One step's choice, from the decision to what it turned out to be worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vllm_nld.auto.candidates import ALL_AR, Choice
from vllm_nld.auto.probing import Probing
from vllm_nld.auto.search import Search


class Expectation(NamedTuple):
    """What a cycle with a draft forward should do, uncorrected: accepted drafts, and seconds."""

    gain: float
    seconds: float


class Cycle:
    """What was chosen for a step, what is expected of it, and what it is charged.

    Called in this order: :meth:`drafted` after the draft forward, if there was one; :meth:`trim` when there are drafts
    to choose from; :meth:`finish`, or :meth:`finish_branched`, after the next causal pass. A cycle whose pass also ran
    a prefill is dropped.

    Args:
        search: whose prices learn.
        probing: whose budget pays.
        choice: what every request does.
        steps: steps without a draft forward that may follow without another plan.
        planned: whether there was anything to choose; then part of its time is saved for probes.
        expected: None if there is no draft forward.
        credit: seconds a probe is not charged: the AR step in its place would have taken them. None: no probe.
    """

    def __init__(
        self,
        search: Search,
        probing: Probing,
        choice: Choice = ALL_AR,
        steps: int = 0,
        planned: bool = False,
        expected: Expectation | None = None,
        credit: float | None = None,
    ) -> None:
        self.choice = choice
        self.steps = steps
        self._search, self._probing = search, probing
        self._planned = planned
        self._expected = expected
        self._credit = credit
        self._draft_seconds = 0.0

    def void(self) -> None:
        """Learn nothing from what the cycle yields: its forwards also serve requests it was not planned for."""
        self._expected = None

    def drafted(self, tokens: int, seconds: float) -> None:
        """Learn what a draft forward over ``tokens`` tokens took."""
        self._account(seconds)
        self._draft_seconds += seconds
        self._search.prices.costs.draft.observe(tokens, seconds)

    def trim(self, chances: Sequence[Sequence[float]], tokens: int, draft_seconds: float) -> list[int]:
        """Return how many drafts of each block to verify. Drafting is paid, but its time is part of the cycle's.

        Args:
            chances: per block, how likely each draft is accepted if those before it are.
            tokens: what the next causal pass runs anyway.
            draft_seconds: what the draft took.
        """
        kept = self._search.worth(chances, tokens, draft_seconds).kept
        self._search.prices.observe_kept(sum(kept), sum(map(len, chances)))
        return kept

    def finish(self, requests: int, tokens: int, accepted: int, seconds: float) -> None:
        """Learn from the causal pass.

        Args:
            requests: requests that it served.
            tokens: tokens that it ran.
            accepted: drafts that it accepted of the blocks that auto mode had drafted.
            seconds: what it took, host time included.
        """
        prices = self._search.prices
        if prices.was_interrupted(requests, tokens, seconds):
            return
        self._learn(requests, accepted, seconds)
        prices.observe_step(requests, tokens, seconds)
        if tokens == requests:
            self._probing.saw_ar(requests)

    def finish_branched(self, requests: int, tokens: int, accepted: int, seconds: float) -> None:
        """Learn from a causal pass with branches, whose time is no price of one without; else as :meth:`finish`.

        Args:
            requests: requests that it served.
            tokens: tokens that it ran, branches included.
            accepted: drafts that it accepted of the blocks that auto mode had drafted.
            seconds: what it took, host time included.
        """
        if self._search.prices.observe_branched(tokens, seconds):
            self._learn(requests, accepted, seconds)

    def _learn(self, requests: int, accepted: int, seconds: float) -> None:
        # Not before: a cycle that is dropped has no AR step's price to set off, only a draft to pay for.
        self._probing.saved += self._credit or 0.0
        self._account(seconds)
        if self._expected is not None:
            took = (self._draft_seconds + seconds) / max(self._expected.seconds, 1e-9)
            self._search.prices.actual(requests).observe(accepted, self._expected.gain, took)

    def _account(self, seconds: float) -> None:
        if self._planned:
            self._probing.save(seconds)
        if self._credit is not None:
            self._probing.saved -= seconds
