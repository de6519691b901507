"""Auto mode: per step and per request, AR or self-speculation, and how long a block, by expected tokens per second.

A step of the engine decides R + G tokens, one per request and G by accepted drafts, and takes C seconds. Both depend on
which requests draft, how long their blocks are, and how many of the drafts are put to the test; the choice that
maximises (R + G) / C is taken. Text is not at stake: AR and self-speculation give the same.
"""

from __future__ import annotations

import operator
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from vllm.logger import init_logger

from vllm_nld.acceptance import Acceptance
from vllm_nld.costs import CostCurve, Costs, round_size

logger = init_logger("vllm.nld.auto")

PROBE_SHARE = 0.01
"""Share of the time that may go into steps which are taken to learn something, not because they look best."""
PROBE_SAVINGS = 10.0
"""Seconds of work whose share may be saved up for probes: a quiet hour must not pay for a burst of them."""
HOPE = 0.9
"""Acceptance rate of a request that would be worth finding: where not even that pays, nobody is probed."""
FRESH_AR_SECONDS = 10.0
"""How old the price of an AR step may become before one is taken to see whether it still holds."""
AR_SAMPLES = 3
"""AR steps needed at a number of requests before their price is believed."""
AR_STEPS_PER_CHOICE = 8
"""AR steps that follow from one choice of AR, as long as the batch stays as it is."""
MARGIN = 1.06
"""How much better than AR drafting must look: the best of many noisy estimates looks better than it is."""
LEAST_CHANCES = (0.9, 0.7, 0.5, 0.35, 0.25, 0.17, 0.12, 0.08, 0.05, 0.03, 0.01)
"""What is tried for the least chance that a draft must have to be worth its place. Each token costs about the same, so
the best choice takes drafts by their chance, whichever request they belong to."""
INTERRUPTED = 8.0
"""Multiple of its price from which on a step's time is no price."""
PROBED_REQUESTS = 4
"""Requests that are probed together."""
PROBE_LENGTH = 8
"""Tokens of a probe's block."""
PROBE_EVERY = 64
"""Steps without a draft after which a request's acceptance counts as unknown."""


FORGET = 0.002
"""Share of a correction that a choice of AR takes back."""
CORRECTION_WEIGHT = 0.03
"""Weight of a cycle in the corrections: what one yields varies as much as it is, and a few poor ones prove nothing."""


@dataclass
class Candidate:
    """A request in auto mode that could draft.

    Attributes:
        row: its row in the batch.
        acceptance: what is known of its drafts.
        longest: tokens of its longest possible block, seed included; at least 2.
        idle_steps: steps since it last drafted.
        must_draft: AR is no choice for it.
    """

    row: int
    acceptance: Acceptance
    longest: int
    idle_steps: int = 0
    must_draft: bool = False


@dataclass
class Correction:
    """How far drafting fell short of what was expected, at a number of requests.

    Attributes:
        gain: accepted drafts, as a share of those expected.
        seconds: time of a cycle, as a multiple of the one expected.
        plain: time of a step without drafts, likewise: prices are medians, and the mean of either is higher.
    """

    gain: float = 1.0
    seconds: float = 1.0
    plain: float = 1.0

    def observe(self, gain: float, seconds: float) -> None:
        """Take in what one cycle yielded and took, relative to what was expected."""
        self.gain += CORRECTION_WEIGHT * (min(gain, 2.0) - self.gain)
        self.seconds += CORRECTION_WEIGHT * (min(seconds, 2.0) - self.seconds)

    def observe_plain(self, seconds: float) -> None:
        """Take in what a step without drafts took, relative to what was expected."""
        self.plain += CORRECTION_WEIGHT * (min(seconds, 2.0) - self.plain)

    def forget(self) -> None:
        """Trust the expectations a little more again: nothing is learned while nobody drafts."""
        self.gain += FORGET * (1 - self.gain)
        self.seconds += FORGET * (1 - self.seconds)


Shared = tuple[dict[int, int], int]
"""A choice as ranks share it: block lengths by row, and for how many steps it holds if it is AR."""


class AutoMode:
    """Chooses block lengths, and how many drafts to verify.

    Args:
        block_length: tokens of the longest block, seed included.
        clock: seconds.
        together: makes a choice one for all tensor-parallel ranks (:func:`vllm_nld.agreement.first_rank_decides`):
            every rank measures prices, but they differ.

    Attributes:
        costs: what steps cost here.
        decisions: how often a request got which ``(mode, block length)``.
    """

    def __init__(
        self,
        block_length: int,
        clock: Callable[[], float] = time.perf_counter,
        together: Callable[[Callable[[], Shared]], Shared] = lambda decide: decide(),
    ) -> None:
        self.block_length = block_length
        self._together = together
        self.costs = Costs()
        self.decisions: Counter[tuple[str, int]] = Counter()
        self._clock = clock
        self._kept = 1.0
        self._last_ar: dict[int, float] = {}
        self._allowance = 0.0
        self._wanted = 0.0
        self._planning = False
        self._charging = False
        self._ar_again: tuple[Any, int] = (None, 0)
        self._corrections: dict[int, Correction] = {}
        self._expected: tuple[Correction, float, float] | None = None
        self._draft_seconds = 0.0

    @property
    def lengths(self) -> list[int]:
        """Block lengths to choose from: powers of two, and the longest."""
        return [n for n in (4, 8, 16, 32, 64) if n < self.block_length] + [self.block_length]

    def plan(self, candidates: Sequence[Candidate], requests: int, tokens: int) -> dict[int, int]:
        """Return block lengths by row; rows that are not in it take an AR step.

        Args:
            candidates: requests that could draft.
            requests: all requests of the batch that decode, these included.
            tokens: what the next causal pass runs anyway: one token a request, and the blocks of other modes.
        """
        self._planning = bool(candidates)
        if not candidates:
            return {}
        chosen, ar_steps = self._together(lambda: self._choose(candidates, requests, tokens))
        self._ar_again = ((requests, tokens, [candidate.row for candidate in candidates]), ar_steps)
        return chosen

    def _choose(self, candidates: Sequence[Candidate], requests: int, tokens: int) -> Shared:
        chosen, why = self._best(candidates, requests, tokens), "best"
        probe = self._probe(candidates, requests, tokens, chosen)
        if probe is not None:
            chosen, why = probe
        self._expect(candidates, requests, tokens, chosen)
        if probe is not None and chosen:
            self._allowance += self._plain_seconds(requests, tokens)  # an AR step would have had its price, too
            self._charging = True
        for candidate in candidates:
            length = chosen.get(candidate.row, 1)
            self.decisions["ar" if length == 1 else "self_speculation", length] += 1
        if logger.isEnabledFor(10):
            logger.debug("auto (%s): %d requests, blocks %s; %s", why, requests, chosen, self._prices(requests))
        return chosen, 0 if chosen or probe is not None else AR_STEPS_PER_CHOICE

    def _expect(self, candidates: Sequence[Candidate], requests: int, tokens: int, chosen: dict[int, int]) -> None:
        """Write down what the chosen cycle should yield and take, uncorrected."""
        correction = self._corrections.setdefault(CostCurve.bucket(requests), Correction())
        self._expected, self._draft_seconds = None, 0.0
        if not chosen:
            correction.forget()
            return
        drafting = [candidate for candidate in candidates if candidate.row in chosen]
        gain = sum(candidate.acceptance.expected_tokens(chosen[candidate.row]) - 1 for candidate in drafting)
        self._expected = (correction, gain, self._cycle_seconds(tokens, sum(chosen.values()), len(chosen)))

    def stays_with_ar(self, rows: list[int], requests: int, tokens: int) -> bool:
        """Whether AR was chosen for just these rows a moment ago: nothing was learned since, so it is chosen again.

        Planning takes host time that an AR step, the cheapest of all, would feel.
        """
        batch, steps = self._ar_again
        if steps == 0 or batch != (requests, tokens, rows):
            return False
        self._ar_again = (batch, steps - 1)
        self.decisions["ar", 1] += len(rows)
        return True

    def _best(
        self, candidates: Sequence[Candidate], requests: int, tokens: int, gain: float | None = None
    ) -> dict[int, int]:
        """Return the blocks with the most tokens per second; expected gains count ``gain`` times (None: corrected)."""
        correction = self._corrections.setdefault(CostCurve.bucket(requests), Correction())
        gain = correction.gain if gain is None else gain
        # Accepted drafts of other modes are decided whatever is chosen here.
        plain = correction.plain * self._plain_seconds(requests, tokens)
        must_draft = any(candidate.must_draft for candidate in candidates)
        best, choice = 0.0 if must_draft else MARGIN * tokens / max(plain, 1e-9), dict[int, int]()
        offers = [self._offers(candidate) for candidate in candidates]
        tried = None
        for least in LEAST_CHANCES:
            blocks, gained = _taken(candidates, offers, least)
            if not blocks or blocks == tried:
                continue
            tried = blocks
            seconds = correction.seconds * self._cycle_seconds(tokens, sum(blocks.values()), len(blocks))
            rate = (tokens + gain * gained) / max(seconds, 1e-9)
            if rate > best:
                best, choice = rate, blocks
        return choice

    def _offers(self, candidate: Candidate) -> list[tuple[float, int, float]]:
        """Return a request's possible blocks, longest first: their last draft's chance, their length, their gain."""
        rate = candidate.acceptance.hopeful_rate
        lengths = dict.fromkeys(min(length, candidate.longest) for length in reversed(self.lengths))
        return [(rate ** (n - 1), n, candidate.acceptance.hopeful_tokens(n) - 1) for n in lengths]

    def _plain_seconds(self, requests: int, tokens: int) -> float:
        if tokens > requests:
            return self.costs.verify.seconds(tokens)
        # As with the sizes of a curve: a step with drafts in it is no cheaper than one without.
        return min(self.costs.ar.seconds(requests), self.costs.verify.ceiling(tokens))

    def _cycle_seconds(self, tokens: int, block_tokens: int, blocks: int) -> float:
        verified = tokens + max(1, round(self._kept * (block_tokens - blocks)))
        return self.costs.draft.seconds(block_tokens) + self.costs.verify.seconds(verified)

    def _probe(
        self, candidates: Sequence[Candidate], requests: int, tokens: int, chosen: dict[int, int]
    ) -> tuple[dict[int, int], str] | None:
        """Return a choice that is made to learn something, with its reason, if one is due and affordable."""
        if any(candidate.must_draft for candidate in candidates):
            return None
        if chosen and tokens == requests:
            bucket = self.costs.ar.bucket(requests)
            if self.costs.ar.samples.get(bucket, 0) < AR_SAMPLES:
                return {}, "AR's price is unknown"
            stale = self._clock() - self._last_ar.get(bucket, 0.0) > FRESH_AR_SECONDS
            if stale and self._afford(self.costs.ar.seconds(requests)):
                return {}, "AR's price is old"
        if chosen:
            return None
        due = [candidate for candidate in candidates if candidate.idle_steps >= PROBE_EVERY]
        if not due or not self._best(_hoped(due), requests, tokens, gain=1.0):
            return None
        due = sorted(due, key=lambda candidate: -candidate.idle_steps)[:PROBED_REQUESTS]
        length = min(PROBE_LENGTH, self.block_length)
        blocks = {candidate.row: min(length, candidate.longest) for candidate in due}
        cycle = self._cycle_seconds(tokens, sum(blocks.values()), len(blocks))
        extra = cycle - self._plain_seconds(requests, tokens)
        return (blocks, "acceptance is unknown") if self._afford(max(extra, 0.0)) else None

    def _afford(self, seconds: float) -> bool:
        """Whether the budget bears this much; what a probe really costs is charged when it is known."""
        self._wanted = seconds
        return seconds <= self._allowance

    def trim(self, chances: Sequence[list[float]], tokens: int, draft_seconds: float) -> list[int]:
        """Return how many drafts of each block to verify.

        Drafts are added in the order of their chance to be accepted (which falls along a block) as long as tokens
        per second rise; drafting is paid already, but belongs to the cycle's time all the same.

        Args:
            chances: per block, how likely each draft is accepted if those before it are.
            tokens: what the next causal pass runs anyway, as in :meth:`plan`.
            draft_seconds: what the draft took.
        """
        ranked: list[tuple[float, int]] = []
        for block, values in enumerate(chances):
            ranked += [(chance, block) for chance in accumulate(values, operator.mul)]
        ranked.sort(key=lambda item: -item[0])
        best, keep, gained = 0.0, len(ranked), 0.0
        for count, (chance, _) in enumerate(ranked, 1):
            gained += chance
            if count < len(ranked) and round_size(tokens + count) != tokens + count:
                continue
            rate = (tokens + gained) / (draft_seconds + self.costs.verify.seconds(tokens + count))
            if rate > best:
                best, keep = rate, count
        kept = [0] * len(chances)
        for _, block in ranked[:keep]:
            kept[block] += 1
        self._kept += 0.1 * (keep / max(1, len(ranked)) - self._kept)
        return kept

    def observe_step(self, requests: int, tokens: int, accepted: int, seconds: float) -> None:
        """Take in a causal step.

        Args:
            requests: requests that it served.
            tokens: what it ran.
            accepted: drafts of auto mode's blocks that it accepted.
            seconds: what it took, host time included.
        """
        if self._was_interrupted(requests, tokens, seconds):
            self.forget_cycle()
            self._charging = False
            return
        self._spend(seconds)
        if self._expected is not None:
            correction, gain, expected_seconds = self._expected
            taken = self._draft_seconds + seconds
            correction.observe(accepted / max(gain, 1e-9), taken / max(expected_seconds, 1e-9))
            self._expected = None
        self._charging = False
        if tokens == requests:
            correction = self._corrections.setdefault(CostCurve.bucket(requests), Correction())
            correction.observe_plain(seconds / max(self._plain_seconds(requests, tokens), 1e-9))
            self.costs.ar.observe(requests, seconds)
            self._last_ar[self.costs.ar.bucket(requests)] = self._clock()
        else:
            self.costs.verify.observe(tokens, seconds)

    def _was_interrupted(self, requests: int, tokens: int, seconds: float) -> bool:
        """Whether a step took so long that this is no price: the process was stopped, or nobody asked for a step."""
        curve, size = (self.costs.ar, requests) if tokens == requests else (self.costs.verify, tokens)
        return curve.is_known(curve.bucket(size)) and seconds > INTERRUPTED * curve.seconds(size)

    def observe_draft(self, tokens: int, seconds: float) -> None:
        """Take in the price of filling blocks of ``tokens`` tokens."""
        self._spend(seconds)
        self._draft_seconds += seconds
        self.costs.draft.observe(tokens, seconds)

    def forget_cycle(self) -> None:
        """Learn nothing from what the chosen cycle takes: its forwards also serve others than it was planned for."""
        self._expected = None

    def _spend(self, seconds: float) -> None:
        if self._planning:
            savings = max(PROBE_SHARE * PROBE_SAVINGS, self._wanted)  # a slow machine's one probe may cost more
            self._allowance = min(self._allowance + PROBE_SHARE * seconds, savings)
        if self._charging:
            self._allowance -= seconds

    def _prices(self, requests: int) -> str:
        length = self.block_length
        return (
            f"AR step {self.costs.ar.seconds(requests) * 1e3:.2f} ms, draft of {length} "
            f"{self.costs.draft.seconds(length) * 1e3:.2f} ms, verify {self.costs.verify.seconds(length) * 1e3:.2f} ms"
        )


def _taken(
    candidates: Sequence[Candidate], offers: Sequence[list[tuple[float, int, float]]], least: float
) -> tuple[dict[int, int], float]:
    """Return the longest blocks whose last drafts have at least this chance to be accepted, and their gain in all."""
    blocks, gained = dict[int, int](), 0.0
    for candidate, own in zip(candidates, offers, strict=True):
        for chance, length, gain in own:
            if chance >= least or (candidate.must_draft and length == own[-1][1]):
                blocks[candidate.row] = length
                gained += gain
                break
    return blocks, gained


def _hoped(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates as they would be if their drafts were good."""
    good = Acceptance(candidates[0].acceptance.prior, accepted=1e6 * HOPE, tested=1e6)
    return [replace(candidate, acceptance=good) for candidate in candidates]
