"""Trials against a clock that knows what steps cost."""

from __future__ import annotations

import random
from collections.abc import Callable

from vllm_nld.auto.trials import AGAIN, Trials


class Engine:
    """Steps of a cost and a yield; asynchronous, so a decision counts one step later."""

    def __init__(self, cycle: float, length: float, noise: float = 0.1) -> None:
        self.cycle, self.length, self.noise = cycle, length, noise
        self.now, self.random = 0.0, random.Random(0)
        self.trials = Trials(lambda: self.now)
        self.planned = True

    def run(self, steps: int, requests: int = 4, comparable: Callable[[int], bool] = lambda _: True) -> float:
        """Return the share of steps with drafts."""
        drafted = 0
        for step in range(steps):
            way, self.planned = self.planned, self.trials.drafts(requests)
            self.now += (self.cycle if way else 1.0) * self.random.uniform(1 - self.noise, 1 + self.noise)
            tokens = round(requests * (self.length if way else 1) * self.random.uniform(1 - self.noise, 1 + self.noise))
            self.trials.saw(requests, way, tokens, comparable(step))
            drafted += way
        return drafted / steps


def test_drafts_where_they_pay() -> None:
    engine = Engine(cycle=2.1, length=5.0)
    engine.run(50)
    assert engine.run(4000) > 0.97


def test_decodes_alone_where_drafts_do_not_pay() -> None:
    engine = Engine(cycle=6.2, length=2.5)
    engine.run(50)
    assert engine.run(4000) < 0.03


def test_drafts_that_cost_many_times_what_they_yield_are_soon_left() -> None:
    """As on a GPU where a step of many drafts has no CUDA graph; also when they are tried again."""
    engine = Engine(cycle=15.0, length=3.3, noise=0.3)
    assert engine.run(40) * 40 <= 10
    assert engine.run(1100) * 1100 <= 7, "the first steps do not count again when they are tried again"
    assert engine.run(8000) * 8000 <= 8 * 7


def test_one_slow_step_decides_nothing() -> None:
    """A kernel is compiled in one of the first steps with drafts, which takes as long as 300 steps."""
    for slow in range(1, 5):
        engine = Engine(cycle=2.0, length=4.0)
        engine.run(slow)
        engine.now += 300.0
        assert engine.run(1000) > 0.9


def test_a_first_glimpse_that_is_near_decides_nothing() -> None:
    """Both ways are tried for whole trials then: of 16 steps each."""
    engine = Engine(cycle=2.1, length=3.3)
    assert 16 <= engine.run(45) * 45 <= 30


def test_a_small_difference_is_found_through_noise() -> None:
    assert Engine(cycle=2.0, length=2.6, noise=0.3).run(6000) > 0.8


def test_changes_are_noticed_both_ways() -> None:
    engine = Engine(cycle=2.0, length=4.0)
    assert engine.run(2000) > 0.9
    engine.length = 1.2
    engine.run(5 * AGAIN)
    assert engine.run(2000) < 0.1
    engine.length = 4.0
    engine.run(5 * AGAIN)
    assert engine.run(2000) > 0.9


def test_numbers_of_requests_are_judged_apart() -> None:
    engine = Engine(cycle=2.0, length=4.0)
    engine.run(500, requests=1)
    engine.cycle = 8.0
    engine.run(100, requests=32)
    assert engine.run(1000, requests=32) < 0.05
    engine.cycle = 2.0
    assert engine.run(1000, requests=1) > 0.9


def often(step: int) -> bool:
    """A prompt in every eighth step."""
    return step % 8 > 0


def test_interruptions_do_not_leave_it_in_the_worse_way() -> None:
    """After calm; and with a first trial of AR that is interrupted again and again."""
    for calm in (600, 40):
        pays, does_not = Engine(cycle=2.6, length=6.8), Engine(cycle=6.2, length=2.0)
        pays.run(calm)
        does_not.run(calm)
        assert pays.run(8000, comparable=often) > 0.95
        does_not.run(500, comparable=often)
        assert does_not.run(8000, comparable=often) < 0.1


def test_a_way_that_cannot_be_measured_is_given_up() -> None:
    """Requests that end as soon as they decode alone."""
    engine = Engine(cycle=2.0, length=3.0)
    engine.run(40)
    engine.run(5, comparable=lambda _: False)
    trials, drafted = engine.trials, 0
    for _ in range(4000):
        way = trials.drafts(4)
        engine.now += 2.0 if way else 1.0
        trials.saw(4, way, 12 if way else 4, comparable=way)
        drafted += way
    assert drafted / 4000 > 0.9


def test_steps_that_cannot_be_compared_decide_nothing() -> None:
    """Never two in a row."""
    engine = Engine(cycle=2.0, length=1.1)
    assert engine.run(1000, comparable=lambda step: step % 2 > 0) == 1.0
