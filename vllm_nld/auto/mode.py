"""Auto mode: per step and per request, AR or self-speculation, and how long a block, by expected tokens per second.

A step of the engine decides R + G tokens, one per request and G by accepted drafts, and takes C seconds. Both depend on
which requests draft, how long their blocks are, how many of the drafts are put to the test, and which requests verify
looked-up drafts instead; the choice that maximises (R + G) / C is taken. Text is not at stake: it is AR's.
"""

from __future__ import annotations

import operator
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from vllm.logger import init_logger

from vllm_nld.auto.candidates import NOTHING, Candidate, Choice, described, hoped, taken
from vllm_nld.auto.correction import Correction
from vllm_nld.auto.costs import CostCurve, Costs
from vllm_nld.ops.sizes import round_size

logger = init_logger("vllm.nld.auto")

PROBE_SHARE = 0.01
"""Share of the time that may go into steps which are taken to learn something, not because they look best."""
PROBE_SAVINGS = 10.0
"""Seconds of work whose share may be saved up for probes: a quiet hour must not pay for a burst of them."""
FRESH_AR_SECONDS = 10.0
"""How old the price of an AR step may become before one is taken to see whether it still holds."""
AR_SAMPLES = 3
"""AR steps needed at a number of requests before their price is believed."""
STEPS_PER_CHOICE = 8
"""Steps without a draft forward that follow from one choice to do without, as long as the batch stays as it is."""
MARGIN = 1.03
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


Shared = tuple[Choice, int]
"""A choice as ranks share it, and how many steps may follow without another look at draft forwards."""


class AutoMode:
    """Chooses block lengths, and how many drafts to verify.

    Args:
        block_length: tokens of the longest block, seed included.
        clock: seconds.
        together: makes a choice one for all tensor-parallel ranks (:func:`vllm_nld.auto.agreement.first_rank_decides`):
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
        self._settled: tuple[Any, int] = (None, 0)
        self._corrections: dict[int, Correction] = {}
        self._expected: tuple[Correction, float, float] | None = None
        self._draft_seconds = 0.0

    @property
    def settled_steps(self) -> int:
        """Steps that :meth:`replan` may answer for."""
        return self._settled[1]

    @property
    def lengths(self) -> list[int]:
        """Block lengths to choose from: powers of two, and the longest."""
        return [n for n in (4, 8, 16, 32, 64) if n < self.block_length] + [self.block_length]

    def plan(self, candidates: Sequence[Candidate], requests: int, tokens: int) -> Choice:
        """Return who drafts how much; all others take an AR step.

        Args:
            candidates: requests that could draft.
            requests: all requests of the batch that decode, these included.
            tokens: what the next causal pass runs anyway: one token a request, and the blocks of other modes.
        """
        self._planning = bool(candidates)
        if not candidates:
            return NOTHING
        choice, steps = self._together(lambda: self._choose(candidates, requests, tokens))
        self._settled = ((requests, tokens, [candidate.row for candidate in candidates]), steps)
        return choice

    def _choose(self, candidates: Sequence[Candidate], requests: int, tokens: int) -> Shared:
        (choice, steps), why = self._best(candidates, requests, tokens), "best"
        probe = self._probe(candidates, requests, tokens, choice)
        if probe is not None:
            (choice, why), steps = probe, 0
        self._expect(candidates, requests, tokens, choice)
        if probe is not None and choice.blocks:
            self._allowance += self._plain_seconds(requests, tokens)  # an AR step would have had its price, too
            self._charging = True
        for candidate in candidates:
            self.decisions[described(candidate.row, choice)] += 1
        if logger.isEnabledFor(10):
            logger.debug("auto (%s): %d requests, %s; %s", why, requests, choice, self._prices(requests))
        return choice, steps

    def _expect(self, candidates: Sequence[Candidate], requests: int, tokens: int, choice: Choice) -> None:
        """Write down what the chosen draft forward's cycle should yield and take, uncorrected."""
        correction = self._correction(requests)
        self._expected, self._draft_seconds = None, 0.0
        blocks = choice.blocks
        if not blocks:
            correction.forget()
            return
        drafting = [candidate for candidate in candidates if candidate.row in blocks]
        gain = sum(candidate.acceptance.expected_tokens(blocks[candidate.row]) - 1 for candidate in drafting)
        tokens += sum(choice.lookups.values())
        self._expected = (correction, gain, self._cycle_seconds(tokens, sum(blocks.values()), len(blocks)))

    def replan(
        self, rows: list[int], requests: int, tokens: int, found: Mapping[int, Sequence[float]]
    ) -> Choice | None:
        """Return a choice without draft forwards, if just these rows did without a moment ago; else None.

        Nothing was learned since that a plan would weigh, and planning takes host time, which an AR step feels. Only
        lookups find something new with every token.

        Args:
            rows: that :meth:`plan` would choose for.
            requests: as there.
            tokens: as there.
            found: chances of looked-up drafts, by row.
        """
        batch, steps = self._settled
        if steps == 0 or batch != (requests, tokens, rows):
            return None
        self._settled = (batch, steps - 1)
        choice = NOTHING
        if found:
            choice, _ = self._together(lambda: (Choice({}, self._lookups(found, requests, tokens)[0]), 0))
        self.decisions["ar", 1] += len(rows) - len(choice.lookups)
        self.decisions.update(described(row, choice) for row in choice.lookups)
        return choice

    def _best(self, candidates: Sequence[Candidate], requests: int, tokens: int) -> Shared:
        """Return what yields the most tokens per second, and for how many steps drafting is out of the question."""
        found = {candidate.row: candidate.found for candidate in candidates if candidate.found}
        lookups, gained, rate = self._lookups(found, requests, tokens)
        floor = MARGIN * self._plain_rate(requests, tokens)
        everyone, best = self._drafting(candidates, requests, tokens, tokens, floor)
        if not everyone:
            return Choice({}, lookups), STEPS_PER_CHOICE
        if not lookups:
            return Choice(everyone, {}), 0
        # Whoever has good drafts already need not draft.
        rest = [candidate for candidate in candidates if candidate.row not in lookups]
        given = tokens + sum(lookups.values())
        blocks, better = self._drafting(rest, requests, tokens + gained, given, MARGIN * rate)
        return (Choice(blocks, lookups) if better >= best else Choice(everyone, {})), 0

    def _drafting(
        self,
        candidates: Sequence[Candidate],
        requests: int,
        decided: float,
        tokens: int,
        floor: float,
        gain: float | None = None,
    ) -> tuple[dict[int, int], float]:
        """Return the blocks with the most tokens per second, and those; none if there are no more than ``floor``.

        Args:
            candidates: who may draft.
            requests: all requests of the batch that decode.
            decided: tokens that the step decides without these drafts, on average.
            tokens: tokens that its causal pass runs without them.
            floor: tokens per second without a draft forward.
            gain: how much expected gains count; None: as they turned out so far.
        """
        correction = self._correction(requests)
        gain = correction.gain if gain is None else gain
        best, blocks, tried = floor, dict[int, int](), None
        offers = [candidate.offers(self.lengths) for candidate in candidates]
        for least in LEAST_CHANCES:
            choice, gained = taken(candidates, offers, least)
            if not choice or choice == tried:
                continue
            tried = choice
            seconds = correction.seconds * self._cycle_seconds(tokens, sum(choice.values()), len(choice))
            rate = (decided + gain * gained) / max(seconds, 1e-9)
            if rate > best:
                best, blocks = rate, choice
        return blocks, best

    def _lookups(
        self, found: Mapping[int, Sequence[float]], requests: int, tokens: int
    ) -> tuple[dict[int, int], float, float]:
        """Return how many looked-up drafts to verify, by row, what they gain, and the tokens per second.

        None, if they do not beat AR. Accepted drafts of other modes are decided whatever is chosen.
        """
        rate = self._plain_rate(requests, tokens)
        if not found:
            return {}, 0.0, rate
        kept, gained, better = self._worth(list(found.values()), tokens, 0.0, self._correction(requests).plain)
        if better < MARGIN * rate:
            return {}, 0.0, rate
        return {row: drafts for row, drafts in zip(found, kept, strict=True) if drafts}, gained, better

    def _plain_rate(self, requests: int, tokens: int) -> float:
        """Return the tokens per second if nobody here drafts; those of other modes' drafts are decided, too."""
        return tokens / max(self._correction(requests).plain * self._plain_seconds(requests, tokens), 1e-9)

    def _correction(self, requests: int) -> Correction:
        return self._corrections.setdefault(CostCurve.bucket(requests), Correction())

    def _plain_seconds(self, requests: int, tokens: int) -> float:
        if tokens > requests:
            return self.costs.verify.seconds(tokens)
        # As with the sizes of a curve: a step with drafts in it is no cheaper than one without.
        return min(self.costs.ar.seconds(requests), self.costs.verify.ceiling(tokens))

    def _cycle_seconds(self, tokens: int, block_tokens: int, blocks: int) -> float:
        verified = tokens + max(1, round(self._kept * (block_tokens - blocks)))
        return self.costs.draft.seconds(block_tokens) + self.costs.verify.seconds(verified)

    def _probe(
        self, candidates: Sequence[Candidate], requests: int, tokens: int, choice: Choice
    ) -> tuple[Choice, str] | None:
        """Return a choice that is made to learn something, with its reason, if one is due and affordable."""
        if choice.drafts and tokens == requests:
            bucket = self.costs.ar.bucket(requests)
            if self.costs.ar.samples.get(bucket, 0) < AR_SAMPLES:
                return NOTHING, "AR's price is unknown"
            stale = self._clock() - self._last_ar.get(bucket, 0.0) > FRESH_AR_SECONDS
            if stale and self._afford(self.costs.ar.seconds(requests)):
                return NOTHING, "AR's price is old"
        if choice.blocks:
            return None
        due = [c for c in candidates if c.idle_steps >= PROBE_EVERY and c.row not in choice.lookups]
        floor = MARGIN * self._plain_rate(requests, tokens)
        if not due or not self._drafting(hoped(due), requests, tokens, tokens, floor, gain=1.0)[0]:
            return None
        due = sorted(due, key=lambda candidate: -candidate.idle_steps)[:PROBED_REQUESTS]
        length = min(PROBE_LENGTH, self.block_length)
        blocks = {candidate.row: min(length, candidate.longest) for candidate in due}
        given = tokens + sum(choice.lookups.values())
        extra = self._cycle_seconds(given, sum(blocks.values()), len(blocks)) - self._plain_seconds(requests, given)
        affordable = self._afford(max(extra, 0.0))
        return (Choice(blocks, choice.lookups), "acceptance is unknown") if affordable else None

    def _afford(self, seconds: float) -> bool:
        """Whether the budget bears this much; what a probe really costs is charged when it is known."""
        self._wanted = seconds
        return seconds <= self._allowance

    def trim(self, chances: Sequence[Sequence[float]], tokens: int, draft_seconds: float) -> list[int]:
        """Return how many drafts of each block to verify; drafting is paid, but belongs to the cycle's time.

        Args:
            chances: per block, how likely each draft is accepted if those before it are.
            tokens: what the next causal pass runs anyway, as in :meth:`plan`.
            draft_seconds: what the draft took.
        """
        kept, _, _ = self._worth(chances, tokens, draft_seconds)
        self._kept += 0.1 * (sum(kept) / max(1, sum(map(len, chances))) - self._kept)
        return kept

    def _worth(
        self, chances: Sequence[Sequence[float]], tokens: int, seconds_before: float, slowness: float = 1.0
    ) -> tuple[list[int], float, float]:
        """Return how many drafts of each block are worth verifying, what they gain, and the tokens per second.

        Drafts are added in the order of their chance to be accepted (which falls along a block), to sizes for which
        there is a kernel, and those with the most tokens per second are kept: at least one.
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
            rate = (tokens + gained) / max(seconds_before + slowness * self.costs.verify.seconds(size), 1e-9)
            if rate > best:
                best, keep, gain = rate, count, gained
        kept = [0] * len(chances)
        for _, block in ranked[:keep]:
            kept[block] += 1
        return kept, gain, best

    def observe_step(self, requests: int, tokens: int, accepted: int, seconds: float) -> None:
        """Take in a causal step.

        Args:
            requests: requests that it served.
            tokens: what it ran.
            accepted: drafts that it accepted of the blocks that auto mode had drafted.
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
            correction.observe(accepted, gain, taken / max(expected_seconds, 1e-9))
            self._expected = None
        self._charging = False
        if tokens == requests:
            price = self._plain_seconds(requests, tokens)
            self._correction(requests).observe_plain(seconds / max(price, 1e-9))
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
