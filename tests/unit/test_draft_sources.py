"""What every draft source keeps to, and what a step makes of several sources' drafts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_nld.auto.candidates import Choice, Taken
from vllm_nld.auto.cycle import Cycle
from vllm_nld.auto.mode import AutoMode
from vllm_nld.draft_pass.token_choice import TokenChoice
from vllm_nld.draft_sources import SOURCES, ModelDrafts, PromptLookup
from vllm_nld.draft_sources.acceptance import Prior
from vllm_nld.draft_sources.base import ByForward, Drafts, DraftSource, NewRequest, Text
from vllm_nld.draft_sources.calibration import ChanceClass
from vllm_nld.draft_sources.model_drafts import chance_classes
from vllm_nld.option import Option
from vllm_nld.options import NLDOptions
from vllm_nld.proposer.blocks import Sizes
from vllm_nld.proposer.request_state import RequestState
from vllm_nld.proposer.speculation import Speculation
from vllm_nld.proposer.step_tokens import StepTokens

MASK, VOCAB = 5, 12


def opened(source: type[DraftSource], prior: Prior | None = None) -> DraftSource:
    values = {option.name: option.default for option in source.options}
    made = source.open(NewRequest(values, prior or Prior(), True, frozenset((MASK,))))
    assert made is not None, "a source with its default options has something to say"
    return made


def test_source_names_differ_and_one_takes_the_forward() -> None:
    names = [source.name for source in SOURCES]
    assert len(set(names)) == len(names)
    assert "ar" not in names, "the metric's label for no drafts"
    assert sum(source.takes_forward for source in SOURCES) == 1


def test_sources_are_documented() -> None:
    page = (Path(__file__).parents[2] / "docs/user/speculation.md").read_text()
    assert not [source.name for source in SOURCES if f"| `{source.name}` |" not in page]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=40),
    st.integers(-1, 15),
    st.lists(st.sampled_from([0, 1, 2]), max_size=4),
)
def test_source_respects_room_and_mask_token(
    source: type[DraftSource], text: list[int], most: int, after: list[int]
) -> None:
    """Over a growing text, 5 being the mask token: no more drafts than there is room for, and no mask."""
    made = opened(source)
    for size in range(1, len(text) + 1):
        ids = np.array(text[:size], dtype=np.int32)
        for sure in ([], after):
            offer = made.offer(ids, lambda: most, sure)
            if isinstance(offer, Drafts):
                assert not source.takes_forward
                assert 1 <= len(offer.tokens) <= most
                assert len(offer.classes) == len(offer.tokens)
                assert MASK not in offer.tokens
                assert all(0 < chance_class.guess < 1 for chance_class in offer.classes)
            elif offer is not None:
                assert source.takes_forward
                assert offer.source == source.name
                assert offer.longest == 1 + most >= 2
        made.planned(taken=True, steps=1)
        made.learn(3, 1)
        made.planned(taken=False, steps=8)
    made.close()


def test_model_drafts_are_expected_to_be_as_good_as_before() -> None:
    prior = Prior()
    made = opened(ModelDrafts, prior)
    for _ in range(30):
        made.learn(15, 1)
    offer = made.offer(np.array([1]), lambda: 15)
    assert isinstance(offer, ByForward)
    assert offer.acceptance.rate < 0.62
    assert offer.idle_steps == 0
    rate = offer.acceptance.rate
    for _ in range(200):
        made.planned(taken=False, steps=9)
    offer = made.offer(np.array([1]), lambda: 15)
    assert isinstance(offer, ByForward)
    assert offer.idle_steps == 1800
    assert rate != offer.acceptance.rate == pytest.approx(prior.rate), "evidence grew old"
    made.planned(taken=True, steps=1)
    offer = made.offer(np.array([1]), lambda: 15)
    assert isinstance(offer, ByForward)
    assert offer.idle_steps == 0


def test_lookup_is_opened_only_if_there_is_something_to_look_up() -> None:
    assert PromptLookup.open(NewRequest({"prompt_lookup": 0}, Prior(), True, frozenset((MASK,)))) is None
    assert PromptLookup.open(NewRequest({"prompt_lookup": 3}, Prior(), False, frozenset((MASK,)))) is None


class Told(DraftSource):
    """Offers what a test tells it to, and remembers what it is told."""

    name = "told"
    options: ClassVar[tuple[Option, ...]] = ()
    takes_forward = False
    kind = ChanceClass("told", 0.9)

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.after: list[list[int]] = []
        self.plans: list[tuple[bool, int]] = []
        self.verified: list[tuple[int, int]] = []
        self.closed = False

    @classmethod
    def open(cls, request: NewRequest) -> Self | None:
        return cls([])

    def offer(self, text: Text, most: Callable[[], int], after: Sequence[int] = ()) -> Drafts | None:
        self.after.append(list(after))
        tokens = self.tokens[: most()]
        return Drafts(list(tokens), [self.kind] * len(tokens)) if tokens else None

    def planned(self, taken: bool, steps: int) -> None:
        self.plans.append((taken, steps))

    def learn(self, drafts: int, accepted: int) -> None:
        self.verified.append((drafts, accepted))

    def close(self) -> None:
        self.closed = True


class Chosen(AutoMode):
    """Auto mode that chooses what a test says."""

    def __init__(self, choice: Choice) -> None:
        super().__init__(8)
        self.choice = choice
        self.seen: list[Any] = []

    def plan(self, candidates: Any, requests: int, tokens: int) -> Cycle:
        self.seen = list(candidates)
        return Cycle(self.search, self.probing, self.choice, planned=True)


def state(mode: str, *sources: DraftSource) -> RequestState:
    params = SimpleNamespace(
        temperature=0.0, seed=None, structured_outputs=None, min_tokens=0, max_tokens=None, allowed_token_ids=None,
        presence_penalty=0.0, frequency_penalty=0.0, repetition_penalty=1.0,
    )  # fmt: skip
    cached = SimpleNamespace(sampling_params=params, prompt_token_ids=[1, 2], output_token_ids=[3])
    prior: Any = Prior()
    options = NLDOptions.parse({"mode": mode})
    return RequestState("r", cached, options, prior, None, sources=(ModelDrafts(prior), *sources))  # type: ignore[arg-type]


def step(made: RequestState, limit: int = 8) -> Speculation:
    tokens = StepTokens([[3]], np.array([3]), np.array([[1, 2, 3, 0, 0, 0]]))
    return Speculation({0: made}, tokens, Sizes(8, VOCAB, MASK, 100), limit)


def fill(speculation: Speculation, confidence: list[float]) -> None:
    block = speculation.blocks[0]
    assert block.tokens == [3] + [MASK] * len(confidence)
    block.tokens[1:] = range(6, 6 + len(confidence))
    block.confidence[1:], block.passes = confidence, 1


def test_first_source_with_drafts_follows_an_unsure_draft() -> None:
    nothing, some, late = Told([]), Told([1, 2]), Told([9, 9, 9])
    made = state("self_speculation", nothing, some, late)
    speculation = step(made, limit=6)
    speculation.plan(AutoMode(8), 1, 1)
    fill(speculation, [0.9, 0.4, 0.9, 0.9, 0.2])
    speculation.collect()
    assert speculation.hand_out() == {0: [6, 1, 2, 9, 10]}
    assert nothing.after == some.after == [[6]]
    assert late.after == []
    made.learn(4, 2)
    assert some.verified == [], "the block is the model's"
    sure = chance_classes([0.9])[0]
    assert made.prior.calibration.probability(sure) > sure.guess, "accepted"
    assert made.prior.calibration.probability(Told.kind) < Told.kind.guess, "of two, the second was rejected"


def test_drawn_drafts_are_not_replaced() -> None:
    """What is verified must not depend on what was drawn."""
    source = Told([1, 2])
    speculation = step(state("self_speculation", source), limit=4)
    speculation.plan(AutoMode(8), 1, 1)
    speculation.blocks[0].choice = TokenChoice(VOCAB)
    fill(speculation, [0.9, 0.4, 0.9])
    speculation.collect()
    assert speculation.hand_out() == {0: [6, 7, 8]}
    assert source.after == []


def test_sure_drafts_are_kept() -> None:
    made = state("self_speculation", Told([1, 2]))
    speculation = step(made, limit=4)
    speculation.plan(AutoMode(8), 1, 1)
    fill(speculation, [0.9, 0.5, 0.9])
    speculation.collect()
    assert speculation.hand_out() == {0: [6, 7, 8]}


def test_drafts_at_hand_need_no_block() -> None:
    poor, good = Told([1]), Told([7, 8, 9])
    poor.name = "poor"  # type: ignore[misc]
    made = state("auto", poor, good)
    auto, speculation = Chosen(Choice({}, {0: Taken("told", 2)})), step(made)
    cycle = speculation.plan(auto, 1, 1)
    (candidate,) = auto.seen
    assert candidate.at_hand.source == "told", "three drafts as likely as one are better"
    assert candidate.forward.longest == 8
    assert speculation.blocks == {}
    speculation.collect()
    speculation.trim(cycle, 1, 0.0)
    assert speculation.hand_out() == {0: [7, 8]}
    assert not made.was_drafted_by_auto
    assert (poor.plans, good.plans) == ([(False, 1)], [(True, 1)])
    made.learn(2, 0)
    assert (poor.verified, good.verified) == ([], [(2, 0)])
    made.close()
    assert good.closed


def test_block_by_forward_belongs_to_the_model_source() -> None:
    source = Told([7])
    made = state("auto", source)
    speculation = step(made)
    speculation.plan(Chosen(Choice({0: 4}, {})), 1, 1)
    fill(speculation, [0.9, 0.9, 0.9])
    speculation.collect()
    assert speculation.hand_out() == {0: [6, 7, 8]}
    assert made.was_drafted_by_auto
    assert source.plans == [(False, 1)]


def test_no_block_opens_without_room() -> None:
    made = state("self_speculation")
    speculation = step(made, limit=1)
    speculation.plan(AutoMode(8), 1, 1)
    speculation.collect()
    assert speculation.hand_out() == {}
