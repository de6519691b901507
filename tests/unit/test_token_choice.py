"""Drafts that are drawn: from the very distribution that the rejection sampler is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_nld.draft_pass.token_choice import DraftChoice

VOCAB, LENGTH = 7, 5
POSITIONS = [1, 2, 3, 4]


def choice(seed: int, **settings: Any) -> DraftChoice:
    return DraftChoice(VOCAB, LENGTH, temperature=settings.pop("temperature", 0.8), seed=seed, **settings)


def logits(seed: int = 0) -> torch.Tensor:
    values = torch.randn(len(POSITIONS), VOCAB, generator=torch.Generator().manual_seed(seed))
    values[:, 2] = -torch.inf  # as the mask token's is
    return values


def test_draws_follow_the_distribution_that_is_told() -> None:
    counts = torch.zeros(len(POSITIONS), VOCAB)
    for seed in range(4000):
        own = choice(seed)
        counts[torch.arange(len(POSITIONS)), own.choose(logits(), POSITIONS, [3])] += 1
    expected = 4000 * (logits() / 0.8).softmax(-1)
    assert own.probs is not None
    torch.testing.assert_close(own.probs * 4000, expected)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    statistic = ((counts - expected) ** 2 / expected)[possible].sum()
    assert statistic < 47.5, "0.1 % of fair draws exceed this with 20 degrees of freedom"


def test_positions_are_drawn_independently() -> None:
    equal = logits()[:1].expand(len(POSITIONS), -1).clone()
    same = sum(bool((ids := choice(seed).choose(equal, POSITIONS, []))[0] == ids[1]) for seed in range(2000))
    expected = float((equal[0] / 0.8).softmax(-1).square().sum())
    assert abs(same / 2000 - expected) < 0.05


def test_what_top_k_rules_out_is_neither_drawn_nor_claimed() -> None:
    own = choice(3, top_k=2)
    ids = own.choose(logits(), POSITIONS, [])
    assert own.probs is not None
    assert ((own.probs > 0).sum(-1) == 2).all()
    assert (own.probs.gather(1, ids[:, None]) > 0).all()
    torch.testing.assert_close(own.peak, own.probs.max(-1).values)


def test_a_seed_s_draws_do_not_depend_on_what_is_beside_it() -> None:
    alone, again = choice(9), choice(9)
    first = alone.choose(logits(), POSITIONS, [])
    other = choice(10)
    other.choose(logits(1), POSITIONS, [])
    assert again.choose(logits(), POSITIONS, []).tolist() == first.tolist()


def test_confidence_says_nothing_of_the_draw() -> None:
    """Else the number of drafts that are verified would depend on it, and the text would not be AR's."""
    peaks = []
    draws = set()
    for seed in range(5):
        own = choice(seed)
        draws.add(tuple(own.choose(logits(), POSITIONS, []).tolist()))
        peaks.append(own.peak)
    assert len(draws) > 1
    assert all(torch.equal(peaks[0], peak) for peak in peaks)


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-6])
def test_the_lowest_temperatures_draw_the_most_probable_token(temperature: float) -> None:
    own = choice(0, temperature=temperature)
    assert own.choose(logits(), POSITIONS, []).tolist() == logits().argmax(-1).tolist()
    assert own.probs is not None
    torch.testing.assert_close(own.probs.sum(-1), torch.ones(len(POSITIONS)))


@pytest.mark.parametrize("repetition", [5e-324, 1e-300, 1e-40, 1e40, 1e308])
def test_extreme_repetition_penalties_leave_a_distribution(repetition: float) -> None:
    own = choice(0, penalties=(0.0, 0.0, repetition), history=([1, 3], [4]))
    values = logits()
    values[:, 3], values[:, 4] = 0.0, 1.0 if repetition < 1 else -1.0
    own.choose(values, POSITIONS, [3])
    assert own.probs is not None
    torch.testing.assert_close(own.probs.sum(-1), torch.ones(len(POSITIONS)))
    if repetition < 1:
        assert (own.probs[:, [1, 4]].sum(-1) > 0.999).all()
    else:
        assert (own.probs[:, 4] == 0).all()
