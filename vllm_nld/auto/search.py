"""The search for the choice with the most tokens per second. It learns nothing and remembers nothing."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from vllm_nld.auto.candidates import AtHand, Candidate, Choice, Taken, longest_blocks_above
from vllm_nld.auto.prices import Prices
from vllm_nld.ops.sizes import round_size

MARGIN = 1.03
"""Required advantage over AR. The maximum of many noisy estimates is biased upward."""
LEAST_CHANCES = (0.9, 0.7, 0.5, 0.35, 0.25, 0.17, 0.12, 0.08, 0.05, 0.03, 0.01)
"""What is tried for the least chance that a draft must have to be worth its place. Each token costs about the same, so
the best choice takes drafts by their chance, whichever request they belong to."""


class Best(NamedTuple):
    """The best choice.

    Attributes:
        choice: what every request does.
        drafting_is_out: whether no draft forward would pay at this batch.
    """

    choice: Choice
    drafting_is_out: bool


class Worth(NamedTuple):
    """How many drafts to verify.

    Attributes:
        kept: drafts per block.
        gain: how many of them are accepted, on average.
        rate: tokens per second of the step.
    """

    kept: list[int]
    gain: float
    rate: float


@dataclass(frozen=True)
class Search:
    """Maximizes (R + G) / C: R tokens of the requests, G accepted drafts, C seconds.

    In all methods, ``requests`` are all requests of the batch that decode, and ``tokens`` is what the next causal pass
    runs in any case: one token a request, and the blocks of other modes.

    Attributes:
        prices: of steps and cycles.
        lengths: block lengths to choose from, ascending.
    """

    prices: Prices
    lengths: Sequence[int]

    def best(self, candidates: Sequence[Candidate], requests: int, tokens: int) -> Best:
        """Return what yields the most tokens per second."""
        offers = {candidate.row: candidate.at_hand for candidate in candidates if candidate.at_hand is not None}
        taken, gained, rate = self.at_hand(offers, requests, tokens)
        everyone, best = self.drafting(candidates, requests, tokens, tokens, self.floor(requests, tokens))
        if not everyone:
            return Best(Choice({}, taken), True)
        if not taken:
            return Best(Choice(everyone, {}), False)
        # A request with good drafts at hand need not draft.
        rest = [candidate for candidate in candidates if candidate.row not in taken]
        given = tokens + Choice({}, taken).tokens_at_hand
        blocks, better = self.drafting(rest, requests, tokens + gained, given, MARGIN * rate)
        return Best(Choice(blocks, taken) if better >= best else Choice(everyone, {}), False)

    def floor(self, requests: int, tokens: int) -> float:
        """Return the tokens per second that drafting has to beat."""
        return MARGIN * self.prices.plain_rate(requests, tokens)

    def drafting(
        self,
        candidates: Sequence[Candidate],
        requests: int,
        decided: float,
        tokens: int,
        floor: float,
        gain: float | None = None,
    ) -> tuple[dict[int, int], float]:
        """Return the blocks with the most tokens per second, and that rate; no blocks if ``floor`` is not beaten.

        Args:
            candidates: requests that may draft.
            requests: see the class.
            decided: tokens that the step decides without these drafts, on average.
            tokens: tokens that its causal pass runs without them.
            floor: tokens per second without a draft forward.
            gain: how much expected gains count; None: as they turned out so far.
        """
        actual = self.prices.actual(requests)
        gain = actual.gain if gain is None else gain
        best, blocks, tried = floor, dict[int, int](), None
        offers = [candidate.offers(self.lengths) for candidate in candidates]
        for least in LEAST_CHANCES:
            choice, gained = longest_blocks_above(candidates, offers, least)
            if not choice or choice == tried:
                continue
            tried = choice
            seconds = actual.seconds * self.prices.cycle_seconds(tokens, sum(choice.values()), len(choice))
            rate = (decided + gain * gained) / max(seconds, 1e-9)
            if rate > best:
                best, blocks = rate, choice
        return blocks, best

    def at_hand(
        self, offers: Mapping[int, AtHand], requests: int, tokens: int
    ) -> tuple[dict[int, Taken], float, float]:
        """Return which drafts at hand to verify, by row, what they gain, and the tokens per second.

        None if they do not beat AR. ``offers`` are by row.
        """
        rate = self.prices.plain_rate(requests, tokens)
        if not offers:
            return {}, 0.0, rate
        chances = [offer.chances for offer in offers.values()]
        worth = self.worth(chances, tokens, 0.0, self.prices.actual(requests).plain)
        if worth.rate < MARGIN * rate:
            return {}, 0.0, rate
        kept = zip(offers.items(), worth.kept, strict=True)
        return {row: Taken(offer.source, n) for (row, offer), n in kept if n}, worth.gain, worth.rate

    def worth(
        self, chances: Sequence[Sequence[float]], tokens: int, seconds_before: float, slowness: float = 1.0
    ) -> Worth:
        """Return how many drafts of each block are worth verifying.

        Drafts are added in the order of their chance to be accepted (which falls along a block), to sizes for which
        there is a kernel, and those with the most tokens per second are kept: at least one.

        Args:
            chances: per block, how likely each draft is accepted if those before it are.
            tokens: see the class.
            seconds_before: what the cycle has taken already.
            slowness: what the pass takes, as a multiple of its price.
        """
        ranked: list[tuple[float, int]] = []
        for block, values in enumerate(chances):
            ranked += [(chance, block) for chance in accumulate(values, operator.mul)]
        ranked.sort(key=operator.itemgetter(0), reverse=True)
        best, keep, gain, gained = 0.0, len(ranked), 0.0, 0.0
        for count, (chance, _) in enumerate(ranked, 1):
            gained += chance
            size = tokens + count
            if count < len(ranked) and round_size(size) != size:
                continue
            rate = (tokens + gained) / max(seconds_before + slowness * self.prices.costs.verify.seconds(size), 1e-9)
            if rate > best:
                best, keep, gain = rate, count, gained
        kept = [0] * len(chances)
        for _, block in ranked[:keep]:
            kept[block] += 1
        return Worth(kept, gain, best)
