"""How likely drafts are accepted: per request from its history, per token from the draft's own confidence."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

MEMORY = 0.9
"""Weight that a request's earlier blocks keep when a new one is verified."""
PRIOR_TRIALS = 6.0
"""What the server's average counts for in a new request, in drafts put to the test."""


@dataclass
class Acceptance:
    """Share of drafts that are accepted, among those put to the test: the accepted ones and the first rejected one.

    Attributes:
        accepted: accepted drafts, older ones weighing less.
        tested: drafts put to the test, likewise.
    """

    accepted: float = 0.75 * PRIOR_TRIALS
    tested: float = PRIOR_TRIALS

    @classmethod
    def like(cls, prior: Acceptance) -> Acceptance:
        """Start from a rate known so far, with the weight of a few drafts."""
        return cls(prior.rate * PRIOR_TRIALS, PRIOR_TRIALS)

    @property
    def rate(self) -> float:
        """Probability that the next draft is accepted, given that those before it in the block were."""
        return self.accepted / self.tested

    def observe(self, drafts: int, accepted: int, memory: float = MEMORY) -> None:
        """Take note of a verified block of ``drafts`` drafts, the first ``accepted`` of which were accepted."""
        self.accepted = memory * self.accepted + accepted
        self.tested = memory * self.tested + min(accepted + 1, drafts)

    def forget(self, prior: Acceptance, share: float) -> None:
        """Move towards what is usual on this server: evidence grows old while a request does not draft."""
        self.accepted += share * (prior.rate * PRIOR_TRIALS - self.accepted)
        self.tested += share * (PRIOR_TRIALS - self.tested)

    def expected_tokens(self, length: int) -> float:
        """Tokens that a cycle over a block of ``length`` tokens yields: 1 + rate + rate^2 + ..., ``length`` terms."""
        rate = min(self.rate, 0.999)
        return float((1 - rate**length) / (1 - rate))


class Calibration:
    """Turns a draft's confidence into the probability that it is accepted, from what was observed."""

    EDGES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
    MIDDLES = (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.925, 0.97, 0.995)

    def __init__(self) -> None:
        # Confidence is taken at its word until there is evidence.
        self._accepted = [4 * middle for middle in self.MIDDLES]
        self._tested = [4.0] * len(self.MIDDLES)

    def probability(self, confidence: float) -> float:
        """Return the probability that a draft of this confidence is accepted, given that those before it were."""
        bin_ = bisect_right(self.EDGES, confidence)
        return self._accepted[bin_] / self._tested[bin_]

    def observe(self, confidences: list[float], accepted: int) -> None:
        """Take note of a verified block: its drafts' confidences, and how many of them were accepted."""
        for position, confidence in enumerate(confidences[: accepted + 1]):
            bin_ = bisect_right(self.EDGES, confidence)
            # Slowly forgetting: traffic changes.
            self._accepted[bin_] = 0.999 * self._accepted[bin_] + (position < accepted)
            self._tested[bin_] = 0.999 * self._tested[bin_] + 1
