"""Drawn drafts: from exactly the distribution that the rejection sampler gets, or with the seed's own noise."""

from __future__ import annotations

from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from vllm_nld.draft_pass.token_choice import DraftChoice, SeededDraftChoice, TokenChoice
from vllm_nld.ops.noise import Noise

VOCAB, LENGTH, PREFIX = 7, 5, 20
POSITIONS = [1, 2, 3, 4]
Kind = TypeVar("Kind", bound=TokenChoice)


def exponential(logits: Tensor, generators: dict[int, torch.Generator], *_: Any) -> tuple[Tensor, None]:
    """Replaces vLLM's sampler: Gumbel-max in its exponential form, with every row's own generator."""
    noise = torch.stack([torch.empty(logits.shape[-1]).exponential_(generator=g) for g in generators.values()])
    return (logits.softmax(-1) / noise).argmax(-1), None


def of_seed(kind: type[Kind], seed: int, prefix: int = PREFIX, **settings: Any) -> Kind:
    return kind(VOCAB, Noise(seed, exponential), prefix, **({"temperature": 0.8} | settings))


def choice(seed: int, **settings: Any) -> DraftChoice:
    return of_seed(DraftChoice, seed, **settings)


def logits(seed: int = 0) -> torch.Tensor:
    values = torch.randn(len(POSITIONS), VOCAB, generator=torch.Generator().manual_seed(seed))
    values[:, 2] = -torch.inf  # as the mask token's is
    return values


def test_draws_follow_the_reported_distribution() -> None:
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


def test_tokens_outside_top_k_are_neither_drawn_nor_reported() -> None:
    own = choice(3, top_k=2)
    ids = own.choose(logits(), POSITIONS, [])
    assert own.probs is not None
    assert ((own.probs > 0).sum(-1) == 2).all()
    assert (own.probs.gather(1, ids[:, None]) > 0).all()
    torch.testing.assert_close(own.peak, own.probs.max(-1).values)


def test_draws_of_a_seed_do_not_depend_on_other_requests() -> None:
    alone, again = choice(9), choice(9)
    first = alone.choose(logits(), POSITIONS, [])
    other = choice(10)
    other.choose(logits(1), POSITIONS, [])
    assert again.choose(logits(), POSITIONS, []).tolist() == first.tolist()


def test_confidence_does_not_depend_on_the_draw() -> None:
    """Otherwise the number of verified drafts would depend on it, and the text would not have AR's distribution."""
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


def test_barred_token_is_neither_drawn_nor_reported() -> None:
    """Not even if the request allows no other token."""
    for constraints in ({}, {"top_k": 1}, {"allowed": [4]}):
        peaked = logits()
        peaked[:, 4] = 50.0
        for seed in range(10):
            own = choice(seed, barred=4, **constraints)
            assert 4 not in own.choose(peaked, POSITIONS, [])
            assert own.probs is not None
            assert own.probs[:, 4].sum() == 0
            torch.testing.assert_close(own.probs.sum(-1), torch.ones(len(POSITIONS)))


@pytest.mark.parametrize("kind", [TokenChoice, SeededDraftChoice])
def test_noise_depends_on_the_position(kind: type[TokenChoice]) -> None:
    """Not on the block, nor on other draws."""
    rows = logits()
    whole = of_seed(kind, 9).choose(rows, POSITIONS, [], 2)
    one = of_seed(kind, 9, prefix=PREFIX + 2).choose(rows[2:3], [POSITIONS[2] - 2], [], 2)
    assert one == whole[2]


def test_seeded_draft_agrees_with_the_causal_pass() -> None:
    """If the two distributions are alike, it nearly always equals the causal pass's draw; it keeps its own
    distribution."""
    rows = logits()
    near = rows + 0.1 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(5))
    agreed, counts = 0, torch.zeros(VOCAB)
    for seed in range(300):
        draft = of_seed(SeededDraftChoice, seed).choose(near, POSITIONS, [], 3)
        causal = Noise(seed, exponential).draw(rows / 0.8, [PREFIX + position for position in POSITIONS])
        agreed += int((draft == causal).sum())
        counts[draft[0]] += 1
    assert agreed > 0.9 * 1200
    expected = 300 * (near[0] / 0.8).softmax(-1)
    statistic = ((counts - expected) ** 2 / expected)[expected > 0].sum()
    assert statistic < 20.5, "0.1 % of fair draws exceed this with 5 degrees of freedom"


def test_every_forward_draws_new_numbers() -> None:
    equal = torch.zeros(len(POSITIONS), VOCAB)
    drawn = {tuple(of_seed(TokenChoice, 3).choose(equal, POSITIONS, [], n).tolist()) for n in range(5)}
    assert len(drawn) == 5


def test_keys_of_seeds_and_positions_do_not_collide() -> None:
    keys = [Noise(seed, exponential).key(p, f) for seed in range(-3, 30) for p in range(30) for f in range(3)]
    assert len(set(keys)) == len(keys)
    assert Noise(-(2**63), exponential).generator(0, torch.device("cpu")) is not None
