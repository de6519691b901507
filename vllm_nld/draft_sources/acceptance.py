"""How likely a request's drafts are accepted, from its history and that of others."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from vllm_nld.draft_sources.calibration import Calibration

MEMORY = 0.95
"""Weight that a request's earlier blocks keep when a new one is verified."""
POOLED_MEMORY = 0.99
"""The same for the average over all requests."""
RECENT = 32
"""Ended requests that say what a good one is."""
TRIES = 2
"""Blocks that tell whether a request is a good one."""


class Prior:
    """What to expect of a request besides its own evidence: the average, and how much it counts.

    Greedy, sampled and seeded requests have one each: their drafts are accepted by different rules.

    The average counts for many drafts where requests are alike and for few where they differ. Which it is, is seen from
    how well each weight would have predicted the blocks so far.
    """

    WEIGHTS = (3.0, 12.0, 48.0)

    def __init__(self) -> None:
        # 3 of 4, until something is known: trying costs little.
        self._accepted, self._tested = 4.5, 6.0
        self._scores = [0.0] * len(self.WEIGHTS)
        self._recent: deque[float] = deque(maxlen=RECENT)
        self.calibration = Calibration()

    @property
    def good_rate(self) -> float:
        """Mean rate of the better quarter of recent requests; 0 while too few have ended."""
        if len(self._recent) < RECENT // 4:
            return 0.0
        best = sorted(self._recent)[-(len(self._recent) // 4) :]
        return sum(best) / len(best)

    def note_end(self, own: Acceptance) -> None:
        """Record a request that is over, if it drafted at all; little evidence is drawn toward the average."""
        if own.all_tested:
            weight = self.WEIGHTS[1]  # two lucky blocks make no good request
            self._recent.append((own.all_accepted + weight * self.rate) / (own.all_tested + weight))

    @property
    def rate(self) -> float:
        """Share of tested drafts that are accepted, over all requests."""
        return self._accepted / self._tested

    @property
    def weight(self) -> float:
        """How many tested drafts the average counts for."""
        return self.WEIGHTS[max(range(len(self.WEIGHTS)), key=lambda i: self._scores[i])]

    def observe(self, own: Acceptance, drafts: int, accepted: int) -> None:
        """Learn from a verified block of a request whose evidence was ``own`` until then."""
        tested = min(accepted + 1, drafts)
        for index, weight in enumerate(self.WEIGHTS):
            rate = min(max(own.rate_with(weight), 0.01), 0.99)
            likelihood = accepted * math.log(rate) + (tested - accepted) * math.log(1 - rate)
            self._scores[index] = 0.995 * self._scores[index] + likelihood
        self._accepted = POOLED_MEMORY * self._accepted + accepted
        self._tested = POOLED_MEMORY * self._tested + tested


@dataclass
class Acceptance:
    """Share of a request's drafts that are accepted, among those tested: the accepted ones and the first rejected one.

    Attributes:
        prior: what is usual on this server.
        accepted: accepted drafts, older ones weighing less.
        tested: drafts tested, likewise.
        blocks: verified blocks so far.
        all_accepted: accepted drafts, all weighing the same.
        all_tested: drafts tested, likewise.
    """

    prior: Prior
    accepted: float = 0.0
    tested: float = 0.0
    blocks: int = 0
    all_accepted: int = 0
    all_tested: int = 0

    @property
    def rate(self) -> float:
        """Probability that the next draft is accepted, given that those before it in the block were."""
        return self.rate_with(self.prior.weight)

    def rate_with(self, weight: float) -> float:
        """Return the rate if the average counts for ``weight`` tested drafts."""
        return (self.accepted + weight * self.prior.rate) / (self.tested + weight)

    def observe(self, drafts: int, accepted: int) -> None:
        """Learn from a verified block of ``drafts`` drafts, the first ``accepted`` of which were accepted."""
        self.prior.observe(self, drafts, accepted)
        self.blocks += 1
        self.all_accepted += accepted
        self.all_tested += min(accepted + 1, drafts)
        self.accepted = MEMORY * self.accepted + accepted
        self.tested = MEMORY * self.tested + min(accepted + 1, drafts)

    def forget(self, share: float) -> None:
        """Let evidence grow old while a request does not draft; what is usual takes its place."""
        self.accepted *= 1 - share
        self.tested *= 1 - share

    @property
    def hopeful_rate(self) -> float:
        """The rate by which to choose: that of a good request, as long as this one has not been tried enough to tell.

        What is learned by trying serves all the rest of its text. Where good requests are rare there is no hope.
        """
        return self.rate if self.blocks >= TRIES else max(self.rate, self.prior.good_rate)

    def expected_tokens(self, length: int) -> float:
        """Tokens that a cycle over a block of ``length`` tokens yields: 1 + rate + rate^2 + ..., ``length`` terms."""
        return _cycle_tokens(self.rate, length)

    def hopeful_tokens(self, length: int) -> float:
        """The same at the hopeful rate."""
        return _cycle_tokens(self.hopeful_rate, length)


def _cycle_tokens(rate: float, length: int) -> float:
    rate = min(rate, 0.999)
    return float((1 - rate**length) / (1 - rate))
