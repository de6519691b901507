"""Looked-up drafts: their positions, and their sources."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_nld.draft_sources.calibration import Calibration
from vllm_nld.draft_sources.model_drafts import chance_classes
from vllm_nld.draft_sources.prompt_lookup import FIRST, LATER, LONGEST_MATCH, MATCH_CLASSES, Found, Lookup

MASK, PAD = 99, 98
NEVER = frozenset((MASK, PAD))


def find(tokens: list[int], length: int, most: int = 4, drafts: tuple[int, ...] = ()) -> Found | None:
    return Lookup(length, NEVER).find(np.array(tokens, dtype=np.int32), most, drafts)


@pytest.mark.parametrize(
    ("tokens", "length", "expected"),
    [
        ([1, 2, 3, 4, 1, 2, 3], 3, Found([4, 1, 2, 3], 3)),
        ([1, 2, 9, 1, 2, 8, 1, 2], 2, Found([8, 1, 2, 8], 2)),
        ([7, 1, 2, 9, 7, 1, 2], 2, Found([9, 7, 1, 2], 3)),
        ([5, 5, 5], 2, Found([5, 5, 5, 5], 2)),
        ([1, 2, MASK, 1, 2], 2, None),
        ([1, 2, 4, MASK, 1, 2], 2, Found([4], 2)),
        ([1, 2, PAD, PAD, 4, 1, 2], 2, None),
        ([1, 2, 4, PAD, MASK, 1, 2], 2, Found([4], 2)),
        ([3, PAD, PAD, PAD], 2, None),
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
    lookup, text = Lookup(length, NEVER), np.array(tokens, dtype=np.int32)
    for size in sorted(data.draw(st.sets(st.integers(1, len(tokens)), min_size=1))):
        expected = brute_force(tokens[:size], length, most)
        assert lookup.may_find(text[:size]) == (expected is not None)
        assert lookup.find(text[:size], most) == expected
        drafts = data.draw(st.lists(st.integers(0, 2), max_size=5))
        assert lookup.find(text[:size], most, drafts) == brute_force(tokens[:size] + drafts, length, most)


def test_match_has_a_class() -> None:
    assert len(FIRST) == len(LATER) == len(MATCH_CLASSES) + 1
    for match, level in ((1, 0), (4, 1), (LONGEST_MATCH, len(MATCH_CLASSES))):
        drafts = Found([7, 8, 9], match).drafts()
        assert (drafts.tokens, drafts.classes) == ([7, 8, 9], [FIRST[level], LATER[level], LATER[level]])


def test_auto_mode_learns_value_of_lookups() -> None:
    calibration = Calibration()
    short, long_ = Found([1, 2], 3).drafts().classes, Found([1, 2], LONGEST_MATCH).drafts().classes
    others = chance_classes([0.995]) + long_
    before = calibration.chances(others)
    assert calibration.chances(short) < before[1:]
    for _ in range(50):
        calibration.observe(short, 0)
    assert calibration.probability(short[0]) < 0.1
    assert calibration.chances(others) == before


def test_poor_match_class_is_tried_again_later() -> None:
    calibration, classes = Calibration(), Found([1, 2], 3).drafts().classes
    guess = calibration.probability(classes[0])
    for _ in range(1000):
        calibration.observe(classes, 0)
    assert calibration.probability(classes[0]) < 0.02
    for _ in range(100_000):
        calibration.offered(classes)
    assert calibration.probability(classes[0]) > 0.9 * guess


def test_nan_confidence_does_not_end_the_engine() -> None:
    calibration, classes = Calibration(), chance_classes([float("nan")])
    assert 0 <= calibration.probability(classes[0]) <= 1
    calibration.observe(classes, 0)


def test_shortened_text_is_read_again() -> None:
    lookup = Lookup(2, NEVER)
    assert lookup.find(np.array([1, 2, 3, 4, 1, 2]), 1) == Found([3], 2)
    assert lookup.find(np.array([1, 2, 5, 1, 2]), 1) == Found([5], 2)
