"""What the steps of a batch are expected to take, from prices by size and from how far past expectations came true."""

from __future__ import annotations

from vllm_nld.auto.costs import CostCurve, Costs
from vllm_nld.auto.expectations import ExpectedVsActual

INTERRUPTED = 8.0
"""A step that took a larger multiple of its price was interrupted, and its time is no price."""
KEPT_WEIGHT = 0.1
"""Weight of one cycle in the share of drafts that are verified."""


class Prices:
    """Seconds of steps and cycles on this machine.

    Attributes:
        costs: prices by size.
        kept: share of the drafts that were verified, of those that were made.
    """

    def __init__(self) -> None:
        self.costs = Costs()
        self.kept = 1.0
        self._actual: dict[int, ExpectedVsActual] = {}

    def actual(self, requests: int) -> ExpectedVsActual:
        """Return how far expectations came true at about this number of requests."""
        return self._actual.setdefault(CostCurve.bucket(requests), ExpectedVsActual())

    def plain_seconds(self, requests: int, tokens: int) -> float:
        """Return the seconds of a causal pass over ``tokens`` tokens of ``requests`` requests, uncorrected."""
        if tokens > requests:
            return self.costs.verify.seconds(tokens)
        # As with the sizes of a curve: a step with drafts in it is not cheaper than one without.
        return min(self.costs.ar.seconds(requests), self.costs.verify.ceiling(tokens))

    def plain_rate(self, requests: int, tokens: int) -> float:
        """Return the tokens per second if no request drafts; drafts of other modes are decided in any case."""
        return tokens / max(self.actual(requests).plain * self.plain_seconds(requests, tokens), 1e-9)

    def cycle_seconds(self, tokens: int, block_tokens: int, blocks: int) -> float:
        """Return the seconds of a draft forward and the causal pass after it, uncorrected.

        Args:
            tokens: what the causal pass runs without these blocks' drafts.
            block_tokens: tokens of the blocks, seeds included.
            blocks: how many blocks.
        """
        verified = tokens + max(1, round(self.kept * (block_tokens - blocks)))
        return self.costs.draft.seconds(block_tokens) + self.costs.verify.seconds(verified)

    def was_interrupted(self, requests: int, tokens: int, seconds: float) -> bool:
        """Whether a step took too long for a price: the process was stopped, or no step was asked for."""
        curve, size = (self.costs.ar, requests) if tokens == requests else (self.costs.verify, tokens)
        return _is_too_long(curve, size, seconds)

    def observe_kept(self, kept: int, drafts: int) -> None:
        """Learn how many drafts of a cycle are verified."""
        self.kept += KEPT_WEIGHT * (kept / max(1, drafts) - self.kept)

    def observe_step(self, requests: int, tokens: int, seconds: float) -> None:
        """Learn what a causal pass took."""
        if tokens == requests:
            price = self.plain_seconds(requests, tokens)
            self.actual(requests).observe_plain(seconds / max(price, 1e-9))
            self.costs.ar.observe(requests, seconds)
        else:
            self.costs.verify.observe(tokens, seconds)

    def observe_branched(self, tokens: int, seconds: float) -> bool:
        """Learn what a causal pass took over ``tokens`` tokens, branches included; return False if too long."""
        if _is_too_long(self.costs.branched, tokens, seconds):
            return False
        self.costs.branched.observe(tokens, seconds)
        return True


def _is_too_long(curve: CostCurve, size: int, seconds: float) -> bool:
    return curve.is_known(curve.bucket(size)) and seconds > INTERRUPTED * curve.seconds(size)
