"""Looked-up drafts: their positions, and their sources."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_nld.auto.acceptance import Calibration
from vllm_nld.draft_pass.block import Block
from vllm_nld.draft_pass.prompt_lookup import LONGEST_MATCH, LOOKED_UP, Found, Lookup, splice

MASK = 99


def find(tokens: list[int], length: int, most: int = 4, drafts: tuple[int, ...] = ()) -> Found | None:
    return Lookup(length, MASK).find(np.array(tokens, dtype=np.int32), most, drafts)


@pytest.mark.parametrize(
    ("tokens", "length", "expected"),
    [
        ([1, 2, 3, 4, 1, 2, 3], 3, Found([4, 1, 2, 3], 3)),
        ([1, 2, 9, 1, 2, 8, 1, 2], 2, Found([8, 1, 2, 8], 2)),
        ([7, 1, 2, 9, 7, 1, 2], 2, Found([9, 7, 1, 2], 3)),
        ([5, 5, 5], 2, Found([5, 5, 5, 5], 2)),
        ([1, 2, MASK, 1, 2], 2, None),
        ([1, 2, 4, MASK, 1, 2], 2, Found([4], 2)),
        ([1, 2, 3, 4], 2, None),
        ([1, 2], 3, None),
        ([1], 1, None),
    ],
)
def test_latest_earlier_occurrence_is_followed(tokens: list[int], length: int, expected: Found | None) -> None:
    assert find(tokens, length) == expected


def brute_force(tokens: list[int], length: int, most: int) -> Found | None:
    for end in range(len(tokens) - 1, length - 1, -1):
        if tokens[end - length : end] == tokens[len(tokens) - length :]:
            matches = [k for k in range(length, min(LONGEST_MATCH, end) + 1) if tokens[end - k : end] == tokens[-k:]]
            return Found([tokens[end + i % (len(tokens) - end)] for i in range(most)], max(matches))
    return None


@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.integers(1, 4), st.integers(1, 15), st.data())
def test_growing_text_is_searched_like_a_new_text(
    tokens: list[int], length: int, most: int, data: st.DataObject
) -> None:
    lookup, text = Lookup(length, MASK), np.array(tokens, dtype=np.int32)
    for size in sorted(data.draw(st.sets(st.integers(1, len(tokens)), min_size=1))):
        expected = brute_force(tokens[:size], length, most)
        assert lookup.may_find(text[:size]) == (expected is not None)
        assert lookup.find(text[:size], most) == expected
        drafts = data.draw(st.lists(st.integers(0, 2), max_size=5))
        assert lookup.find(text[:size], most, drafts) == brute_force(tokens[:size] + drafts, length, most)


def block(confidence: list[float]) -> Block:
    return Block(7, [3, 4, 5, 6, 7], confidence=[1.0, *confidence])


HISTORY = np.array([1, 2, 3, 4, 30, 31, 32, 33, 34, 2, 3], dtype=np.int32)


def test_sure_drafts_are_kept_and_others_looked_up() -> None:
    own = block([0.9, 0.4, 0.9, 0.9])
    splice(own, Lookup(3, MASK), HISTORY)
    assert own.tokens == [3, 4, 30, 31, 32], "2 3 4 occurred before: 3 is the seed, 4 the sure draft"
    assert own.confidence == [1.0, 0.9, LOOKED_UP, LOOKED_UP + 1, LOOKED_UP + 1]


def test_nothing_changes_without_match_or_unsure_draft() -> None:
    for own, history in ((block([0.9] * 4), HISTORY), (block([0.4] * 4), HISTORY[4:])):
        before = list(own.tokens), list(own.confidence)
        splice(own, Lookup(3, MASK), history)
        assert (own.tokens, own.confidence) == before


def test_tail_is_kept_if_lookup_has_the_mask_token() -> None:
    own = Block(7, [3, 4, 5, 6, 7], confidence=[1.0, 0.9, 0.2, 0.2, 0.2])
    splice(own, Lookup(3, MASK), np.array([2, 3, 4, 9, MASK, 2, 3], dtype=np.int32))
    assert own.tokens == [3, 4, 9, 6, 7]
    assert own.confidence == [1.0, 0.9, LOOKED_UP, 0.2, 0.2]


def test_auto_mode_learns_value_of_lookups() -> None:
    calibration = Calibration()
    short, long_ = Found([1, 2], 3).confidence(), Found([1, 2], LONGEST_MATCH).confidence()
    before = list(map(calibration.probability, [0.995, *long_]))
    assert list(map(calibration.probability, short)) < before[1:]
    for _ in range(50):
        calibration.observe(short, 0)
    assert calibration.probability(short[0]) < 0.1
    assert list(map(calibration.probability, [0.995, *long_])) == before


def test_poor_match_class_is_tried_again_later() -> None:
    calibration, (first, _) = Calibration(), Found([1, 2], 3).confidence()
    guess = calibration.probability(first)
    for _ in range(1000):
        calibration.observe([first], 0)
    assert calibration.probability(first) < 0.02
    for _ in range(100_000):
        calibration.forget(first)
    assert calibration.probability(first) > 0.9 * guess


def test_nan_confidence_does_not_end_the_engine() -> None:
    calibration = Calibration()
    assert 0 <= calibration.probability(float("nan")) <= 1
    calibration.observe([float("nan")], 0)


def test_shortened_text_is_read_again() -> None:
    lookup = Lookup(2, MASK)
    assert lookup.find(np.array([1, 2, 3, 4, 1, 2]), 1) == Found([3], 2)
    assert lookup.find(np.array([1, 2, 5, 1, 2]), 1) == Found([5], 2)
