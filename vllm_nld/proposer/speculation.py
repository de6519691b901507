"""The drafts of one step: of requests in self-speculation, and of those for which auto mode chooses.

It asks every draft source by the same few methods (:class:`vllm_nld.draft_sources.base.DraftSource`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from vllm_nld.auto.candidates import AtHand, Candidate, most_promising
from vllm_nld.auto.cycle import Cycle
from vllm_nld.auto.mode import AutoMode
from vllm_nld.branches.places import RANKS
from vllm_nld.draft_pass.block import Block
from vllm_nld.draft_pass.token_choice import DraftChoice
from vllm_nld.draft_sources.base import ByForward, Drafts, DraftSource
from vllm_nld.draft_sources.model_drafts import chance_classes
from vllm_nld.proposer.blocks import Sizes, draft_block
from vllm_nld.proposer.request_state import RequestState
from vllm_nld.proposer.step_tokens import StepTokens

UNSURE = 0.5
"""Confidence below which a draft is more often wrong than right."""

Offers = dict[str, tuple[DraftSource, Drafts]]
"""Drafts at hand, by the name of their source."""


@dataclass
class Speculation:
    """One step's drafts. The methods are called in the order in which they stand here, once each.

    Attributes:
        states: the requests that may draft, by row.
        tokens: of the step that has just been decided.
        sizes: the engine's.
        limit: tokens that memory and the next step's budget allow a block, seed included.
        blocks: to be filled by a draft forward, by row; known once planned.
        drafts: to verify, with their source, by row: those at hand once planned, the others once collected.
    """

    states: dict[int, RequestState]
    tokens: StepTokens
    sizes: Sizes
    limit: int
    blocks: dict[int, Block] = field(default_factory=dict)
    drafts: dict[int, tuple[DraftSource, Drafts]] = field(default_factory=dict)

    def plan(self, auto: AutoMode, requests: int, given: int) -> Cycle:
        """Choose blocks and drafts at hand; return the cycle that auto mode chose.

        Args:
            auto: chooses for requests in auto mode.
            requests: all requests in the next causal pass.
            given: tokens of that pass if none of ``states`` has drafts.
        """
        adaptive = []
        for row, state in self.states.items():
            if state.is_adaptive:
                adaptive.append(row)
            elif (longest := self._longest(row)) >= 2:
                self._open(row, longest)
        if not adaptive:
            return auto.idle()
        return self._choose(auto, adaptive, requests, given + sum(block.length - 1 for block in self.blocks.values()))

    def _choose(self, auto: AutoMode, rows: list[int], requests: int, given: int) -> Cycle:
        offers = {row: own for row in rows if (own := self._offers(row))}
        best = {row: self._best(row, own) for row, own in offers.items()}
        cycle = auto.replan(rows, requests, given, best)
        if cycle is None:
            candidates = [
                Candidate(row, offer, best.get(row))
                for row in rows
                if (offer := self._offer_of_forward(row)) is not None
            ]
            cycle = auto.plan(candidates, requests, given)
            for candidate in candidates:
                self._tell_sources(candidate.row, cycle)
        for row, length in cycle.choice.blocks.items():
            self._open(row, length)
        for row, (name, count) in cycle.choice.at_hand.items():
            source, drafts = offers[row][name]
            drafts.keep(count)
            self.drafts[row] = source, drafts
        return cycle

    def _offers(self, row: int) -> Offers:
        """Return what sources have at hand for a row."""
        state, found = self.states[row], dict[str, tuple[DraftSource, Drafts]]()
        if state.at_hand:
            text, most = self.tokens.history(row), self._room(row)
            for source in state.at_hand:
                drafts = source.offer(text, most)
                if isinstance(drafts, Drafts):
                    found[source.name] = source, drafts
        return found

    def _best(self, row: int, offers: Offers) -> AtHand:
        calibration = self.states[row].prior.calibration
        rated = []
        for name, (_, drafts) in offers.items():
            calibration.offered(drafts.classes)
            rated.append(AtHand(name, calibration.chances(drafts.classes)))
        return most_promising(rated)

    def _offer_of_forward(self, row: int) -> ByForward | None:
        offer = self.states[row].by_forward.offer(self.tokens.history(row), self._room(row))
        assert not isinstance(offer, Drafts), "a source that takes a forward has no drafts before it"
        return offer

    def _tell_sources(self, row: int, cycle: Cycle) -> None:
        blocks, at_hand = cycle.choice
        for source in self.states[row].sources:
            taken = row in blocks if source.takes_forward else row in at_hand and at_hand[row].source == source.name
            source.planned(taken, 1 + cycle.steps)

    def _room(self, row: int) -> Callable[[], int]:
        return lambda: self._longest(row) - 1

    def _longest(self, row: int) -> int:
        """Return the tokens of a row's longest possible block, seed included."""
        state = self.states[row]
        room = self.sizes.max_model_len - int(self.tokens.decided[row])
        return state.longest_draft_block(min(state.options.block_length or self.sizes.longest, room, self.limit))

    def _open(self, row: int, length: int) -> None:
        state = self.states[row]
        self.blocks[row] = draft_block(state, self.sizes, *self.tokens.seed(row), length)

    def look_past(self, wants: Callable[[RequestState], bool], room: int, most_drawn: int) -> None:
        """Have draft passes predict the position after a block, where branches want it and it costs little.

        Args:
            wants: whether a request's branches do, and want candidates of each position.
            room: tokens of a draft pass.
            most_drawn: of drafts of each request, as far as memory is concerned.
        """
        room -= sum(block.length for block in self.blocks.values())
        for row, block in self.blocks.items():
            if not wants(self.states[row]):
                continue
            block.ranked = RANKS
            if room > 0 and block.length < self.left(row) and (block.choice is None or block.length <= most_drawn):
                block.look_past(self.sizes.mask_token_id)
                room -= 1

    def left(self, row: int) -> int:
        """Return how many tokens a row's request may still emit."""
        room = self.sizes.max_model_len - int(self.tokens.decided[row])
        return self.states[row].remaining(room)

    def collect(self) -> None:
        """Take the drafts of the filled blocks. After the first unsure one, sources may have better ones at hand."""
        for row, block in self.blocks.items():
            verified = slice(1, block.length - block.beyond)
            state, confidence = self.states[row], block.confidence[verified]
            drafts = Drafts(block.tokens[verified], chance_classes(confidence))
            self.drafts[row] = state.by_forward, drafts
            if state.at_hand and block.choice is None:  # drawn drafts are left as they are
                unsure = next((place for place, value in enumerate(confidence) if value < UNSURE), None)
                if unsure is not None:
                    self._replace(row, drafts, unsure)

    def _replace(self, row: int, drafts: Drafts, unsure: int) -> None:
        text, sure = self.tokens.history(row), drafts.tokens[:unsure]
        room = len(drafts.tokens) - unsure
        for source in self.states[row].at_hand:
            better = source.offer(text, lambda: room, sure)
            if isinstance(better, Drafts):
                drafts.replace(unsure, better)
                return

    def trim(self, cycle: Cycle, given: int, seconds: float) -> None:
        """Leave those drafts of requests in auto mode that are worth verifying.

        Args:
            cycle: what was planned.
            given: tokens of the next causal pass without drafts.
            seconds: what drafting took.
        """
        adaptive = [row for row in self.drafts if self.states[row].is_adaptive]
        if not any(row in self.blocks for row in adaptive):
            return  # drafts at hand were chosen by what they are worth
        given += sum(len(drafts.tokens) for row, (_, drafts) in self.drafts.items() if row not in adaptive)
        chances = [self.states[row].prior.calibration.chances(self.drafts[row][1].classes) for row in adaptive]
        # vLLM takes the first rank's drafts; how many another one keeps does not matter.
        for row, count in zip(adaptive, cycle.trim(chances, given, seconds), strict=True):
            self.drafts[row][1].keep(count)

    def hand_out(self) -> dict[int, list[int]]:
        """Return the tokens to verify, by row."""
        handed_out: dict[int, list[int]] = {}
        for row, (source, drafts) in self.drafts.items():
            state, block = self.states[row], self.blocks.get(row)
            state.handed_out = source, drafts.classes
            choice = None if block is None else block.choice
            state.draft_probs = choice.probs if isinstance(choice, DraftChoice) else None
            if state.draft_probs is not None and block is not None and block.beyond:
                verified = block.length - block.beyond - 1
                state.draft_probs = state.draft_probs[:verified].clone()  # a view would keep all rows
            tokens = drafts.tokens
            if state.thinking is not None:
                tokens = state.thinking.before_start(self.tokens.history(row), tokens)
            handed_out[row] = tokens
        return handed_out
