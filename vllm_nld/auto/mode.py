"""Auto mode: per step and per request, AR or self-speculation, and how long a block, by expected tokens per second.

A step of the engine decides R + G tokens, one per request and G by accepted drafts, and takes C seconds. Both depend on
which requests draft, how long their blocks are, how many of the drafts are verified, and which requests instead verify
drafts that are at hand without a forward; the choice that maximizes (R + G) / C is taken. Every choice produces the
same text as AR; only the speed differs.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from vllm.logger import init_logger

from vllm_nld.auto.candidates import ALL_AR, AtHand, Candidate, Choice, label
from vllm_nld.auto.costs import Costs
from vllm_nld.auto.cycle import Cycle, Expectation
from vllm_nld.auto.prices import Prices
from vllm_nld.auto.probing import Probing
from vllm_nld.auto.search import Search

logger = init_logger("vllm.nld.auto")

STEPS_PER_CHOICE = 8
"""Steps without a draft forward that follow from one choice to do without, as long as the batch stays as it is."""

Shared = tuple[Choice, int]
"""A choice as ranks share it, and how many steps may follow without another look at draft forwards."""


class Settled(NamedTuple):
    """A batch that does without draft forwards for some more steps: requests, tokens and rows, and the steps left."""

    batch: tuple[int, int, list[int]] | None = None
    steps: int = 0


class AutoMode:
    """Chooses block lengths, and how many drafts to verify.

    For every step, call :meth:`replan`; if that has no answer, :meth:`plan`; or :meth:`idle` if no request is in auto
    mode. The :class:`~vllm_nld.auto.cycle.Cycle` they return says what is called next.

    Args:
        block_length: tokens of the longest block, seed included.
        clock: seconds.
        together: makes a choice one for all tensor-parallel ranks
            (:func:`vllm_nld.auto.agreement.first_rank_decides`): every rank measures prices, but they differ.

    Attributes:
        search: finds the best choice; its prices are what steps cost here.
        probing: takes steps to learn something.
        decisions: how often a request got which ``(source of drafts or "ar", block length)``.
    """

    def __init__(
        self,
        block_length: int,
        clock: Callable[[], float] = time.perf_counter,
        together: Callable[[Callable[[], Shared]], Shared] = lambda decide: decide(),
    ) -> None:
        # Powers of two, and the longest.
        lengths = [n for n in (4, 8, 16, 32, 64) if n < block_length] + [block_length]
        self.search = Search(Prices(), lengths)
        self.probing = Probing(self.search, clock)
        self.decisions: Counter[tuple[str, int]] = Counter()
        self._together = together
        self._settled = Settled()

    @property
    def costs(self) -> Costs:
        """What steps cost here."""
        return self.search.prices.costs

    def idle(self) -> Cycle:
        """Return the cycle of a step in which there is nothing to choose; it learns prices all the same."""
        return Cycle(self.search, self.probing)

    def plan(self, candidates: Sequence[Candidate], requests: int, tokens: int) -> Cycle:
        """Choose which requests draft how much; all others take an AR step.

        Args:
            candidates: requests that could draft.
            requests: all requests of the batch that decode, these included.
            tokens: what the next causal pass runs anyway: one token a request, and the blocks of other modes.
        """
        if not candidates:
            return self.idle()
        own: list[Cycle] = []

        def decide() -> Shared:
            own.append(self._decide(candidates, requests, tokens))
            return own[0].choice, own[0].steps

        choice, steps = self._together(decide)
        # Only the rank that decided knows what it expects.
        cycle = own[0] if own else Cycle(self.search, self.probing, choice, steps, planned=True)
        self._settled = Settled((requests, tokens, [candidate.row for candidate in candidates]), steps)
        by_forward = {candidate.row: candidate.forward.source for candidate in candidates}
        self.decisions.update(label(candidate.row, choice, by_forward) for candidate in candidates)
        return cycle

    def _decide(self, candidates: Sequence[Candidate], requests: int, tokens: int) -> Cycle:
        best = self.search.best(candidates, requests, tokens)
        choice, steps, why = best.choice, STEPS_PER_CHOICE if best.drafting_is_out else 0, "best"
        probe = self.probing.due(candidates, requests, tokens, choice)
        credit = None
        if probe is not None:
            (choice, why), steps = probe, 0
            credit = self.search.prices.plain_seconds(requests, tokens) if choice.blocks else None
        if logger.isEnabledFor(10):
            logger.debug("auto (%s): %d requests, %s; %s", why, requests, choice, self._prices(requests))
        expected = self._expectation(candidates, requests, tokens, choice)
        return Cycle(self.search, self.probing, choice, steps, planned=True, expected=expected, credit=credit)

    def _expectation(
        self, candidates: Sequence[Candidate], requests: int, tokens: int, choice: Choice
    ) -> Expectation | None:
        blocks, prices = choice.blocks, self.search.prices
        if not blocks:
            prices.actual(requests).forget()
            return None
        drafting = [candidate for candidate in candidates if candidate.row in blocks]
        gain = sum(own.forward.acceptance.expected_tokens(blocks[own.row]) - 1 for own in drafting)
        tokens += choice.tokens_at_hand
        return Expectation(gain, prices.cycle_seconds(tokens, sum(blocks.values()), len(blocks)))

    def replan(self, rows: list[int], requests: int, tokens: int, at_hand: Mapping[int, AtHand]) -> Cycle | None:
        """Return a cycle without a draft forward, if just these rows did without a moment ago; else None.

        Nothing was learned since that a plan would weigh, and planning takes host time, which an AR step feels. Only
        drafts at hand may be new with every token.

        Args:
            rows: that :meth:`plan` would choose for.
            requests: as there.
            tokens: as there.
            at_hand: what could be verified without a draft forward, by row.
        """
        batch, steps = self._settled
        if steps == 0 or batch != (requests, tokens, rows):
            return None
        self._settled = Settled(batch, steps - 1)
        choice = ALL_AR
        if at_hand:
            choice, _ = self._together(lambda: (Choice({}, self.search.at_hand(at_hand, requests, tokens)[0]), 0))
        self.decisions.update(label(row, choice, {}) for row in rows)
        return Cycle(self.search, self.probing, choice, steps - 1, planned=True)

    def _prices(self, requests: int) -> str:
        length = self.search.lengths[-1]
        return (
            f"AR step {self.costs.ar.seconds(requests) * 1e3:.2f} ms, draft of {length} "
            f"{self.costs.draft.seconds(length) * 1e3:.2f} ms, verify {self.costs.verify.seconds(length) * 1e3:.2f} ms"
        )
