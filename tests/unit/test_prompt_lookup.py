"""Drafts that are looked up: where they go, and where they come from."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_nld.acceptance import Calibration
from vllm_nld.block import Block
from vllm_nld.prompt_lookup import LOOKED_UP, follow, splice


@pytest.mark.parametrize(
    ("tokens", "length", "expected"),
    [
        ([1, 2, 3, 4, 1, 2, 3], 3, [4, 1, 2, 3]),
        ([1, 2, 9, 1, 2, 8, 1, 2], 2, [8, 1, 2]),
        ([5, 5, 5], 2, [5]),
        ([1, 2, 3, 4], 2, []),
        ([1, 2], 3, []),
        ([1], 1, []),
    ],
)
def test_the_latest_earlier_occurrence_is_followed(tokens: list[int], length: int, expected: list[int]) -> None:
    assert follow(np.array(tokens, dtype=np.int32), length) == expected


def block(confidence: list[float]) -> Block:
    return Block(7, [3, 4, 5, 6, 7], confidence=[1.0, *confidence])


HISTORY = np.array([1, 2, 3, 4, 30, 31, 32, 33, 34, 2, 3], dtype=np.int32)


def test_sure_drafts_are_kept_and_the_rest_is_looked_up() -> None:
    own = block([0.9, 0.4, 0.9, 0.9])
    splice(own, HISTORY, 3)
    assert own.tokens == [3, 4, 30, 31, 32], "2 3 4 occurred before: 3 is the seed, 4 the sure draft"
    assert own.confidence == [1.0, 0.9, LOOKED_UP, LOOKED_UP, LOOKED_UP]


def test_without_a_match_or_doubt_nothing_changes() -> None:
    for own, history in ((block([0.9] * 4), HISTORY), (block([0.4] * 4), HISTORY[4:])):
        before = list(own.tokens), list(own.confidence)
        splice(own, history, 3)
        assert (own.tokens, own.confidence) == before


def test_a_short_match_leaves_the_tail() -> None:
    own = Block(7, [3, 4, 5, 6, 7], confidence=[1.0, 0.9, 0.2, 0.2, 0.2])
    splice(own, np.array([2, 3, 4, 9, 2, 3], dtype=np.int32), 3)
    assert own.tokens == [3, 4, 9, 2, 3]
    splice(own := Block(7, [3, 4, 5, 6, 7], confidence=[1.0, 0.1, 0.2, 0.2, 0.2]), np.array([2, 3, 9, 2, 3]), 2)
    assert own.tokens == [3, 9, 2, 3, 7]


def test_auto_mode_learns_what_they_are_worth() -> None:
    calibration = Calibration()
    sure = calibration.probability(0.995)
    for _ in range(50):
        calibration.observe([LOOKED_UP, LOOKED_UP], 0)
    assert calibration.probability(LOOKED_UP) < 0.1
    assert calibration.probability(0.995) == sure
