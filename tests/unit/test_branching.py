"""Which branches of requests are worth their time, by what forwards cost."""

from __future__ import annotations

import random
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_nld.auto.costs import Costs
from vllm_nld.branches.places import Branch
from vllm_nld.draft_pass.block import Block
from vllm_nld.options import NLDOptions
from vllm_nld.proposer.branching import Branching, Drafted
from vllm_nld.proposer.pending import Pending
from vllm_nld.serving.ledger import Ledger, Tally

SIZES = (1, 8, 16, 32, 64, 128, 256, 512)


def drafted(branches: str | int, sure: float = 0.5) -> Drafted:
    """A block of six tokens, of which every draft is as likely right, and the position after it."""
    options = NLDOptions.parse({"mode": "self_speculation", "branches": branches, "branch_length": 4})
    state: Any = SimpleNamespace(options=options, pending=None)
    rest = (1 - sure) / 3
    block = Block(40, [1, 11, 12, 13, 14, 15, 16], beyond=1)
    block.candidates = {place: ([10 + place, 20, 21, 22], [sure, rest, rest, rest]) for place in range(1, 7)}
    return Drafted(state, block, block.tokens[1:6], left=100)


def branching_at_any_time(costs: Costs, together: Any) -> Branching:
    """Branching that asks for prices only, and has nothing to try."""
    branching = Branching(8, Ledger(), costs, together)
    branching.trials.drafts = lambda _: True  # type: ignore[method-assign]
    return branching


def planned(price: Any, *requests: Drafted, calls: list[int] | None = None) -> list[int]:
    """Plan with forwards that take ``price(tokens)`` seconds; return how many branches each request has."""
    costs = Costs()
    for size in SIZES:
        costs.start(size, price(size))

    def together(decide: Any) -> int:
        if calls is not None:
            calls.append(1)
        return int(decide())

    branching = branching_at_any_time(costs, together)
    branching.choose_way([one.state for one in requests])
    branching.plan(requests, tokens=6 * len(requests))
    return [0 if one.state.pending is None else len(one.state.pending.branches) for one in requests]


def test_where_a_longer_forward_costs_nothing_all_are_taken() -> None:
    assert planned(lambda tokens: 1.0, drafted("auto")) == [8]


def test_where_time_is_proportional_to_tokens_none_is() -> None:
    assert planned(lambda tokens: float(tokens), drafted("auto")) == [0]


def test_some_are_taken_in_between() -> None:
    (count,) = planned(lambda tokens: 1 + tokens / 100, drafted("auto"))
    assert 1 <= count < 8


def test_steps_that_took_longer_than_forwards_of_their_size_are_believed() -> None:
    """A step with branches also takes host time that a bare forward, timed at start-up, knows nothing of."""
    costs = Costs()
    for size in SIZES:
        costs.start(size, 1.0)
    branching, one = branching_at_any_time(costs, lambda decide: int(decide())), drafted("auto")
    branching.choose_way([one.state])
    branching.plan([one], tokens=6)
    assert one.state.pending is not None and len(one.state.pending.branches) == 8
    for _ in range(5):
        for size in SIZES:
            costs.branched.observe(size, 2.5)
    branching.plan([one], tokens=6)
    assert one.state.pending.branches == []


@pytest.mark.parametrize(("with_branches", "pays"), [(2.5, False), (1.2, True)])
def test_branches_by_price_are_used_where_they_yield_more(with_branches: float, pays: bool) -> None:
    """Prices know nothing of what planning takes and what follows: both ways are tried, and the faster one goes on."""
    costs, now, used = Costs(), [0.0], list[int]()
    for size in SIZES:
        costs.start(size, 1.0)
    branching, one = Branching(8, Ledger(), costs, lambda decide: int(decide())), drafted("auto")
    branching.trials._clock = lambda: now[0]
    for step in range(400):
        branching.choose_way([one.state])
        branching.plan([one], tokens=6)
        used.append(0 if one.state.pending is None else len(one.state.pending.branches))
        assert branching.looks_past(one.state) == (used[-1] > 0), "drafts are longer, and ranked, for branches only"
        now[0] += with_branches if used[-1] else 2.0
        branching.learn(3, comparable=step % 50 > 0)
    assert set(used[:64]) == {0} and 8 in used[:100], "they are tried when it is known what doing without yields"
    assert set(used[200:]) == {8 if pays else 0}


@pytest.mark.parametrize(("ratio", "least"), [(0.95, 0.99), (1.1, 1.06)])
def test_trials_by_chance_cost_little(ratio: float, least: float) -> None:
    """One request's steps yield very different numbers of tokens; branches yield ``ratio`` times as much."""
    yields, plain = list[float](), 3.12  # tokens a second without branches
    for seed in range(6):
        draw, now, tokens, way = random.Random(seed), [0.0], 0, False
        trials = Branching(8, Ledger(), Costs(), lambda decide: int(decide())).trials
        trials._clock = partial(now.__getitem__, 0)
        for _ in range(8000):
            took, way = way, trials.drafts(1)
            decided = draw.choices(range(1, 9), [30, 20, 15, 10, 8, 7, 5, 5])[0]
            now[0] += 1 / (ratio if took else 1)
            tokens += decided
            trials.saw(1, took, decided, comparable=True)
        yields.append(tokens / now[0] / plain)
    assert sum(yields) / len(yields) > least


@pytest.mark.parametrize(("options", "length"), [({}, 1), ({"mode": "auto"}, 6), ({"branches": "auto"}, 6)])
def test_a_miss_decides_one_token_unless_draft_forwards_are_priced(options: dict[str, Any], length: int) -> None:
    """Not twice: if there was no room for the mask branch after it, a draft forward follows."""
    branching = Branching(8, Ledger(), Costs(), lambda decide: int(decide()))
    own = NLDOptions.parse({"mode": "self_speculation", "branches": 3} | options)
    for verified, left in (([1, 2, 3], length), ([1], 6)):
        pending = Pending(verified, prefix=10, branches=[], beyond=True, left=50)
        state: Any = SimpleNamespace(options=own, pending=pending, tally=Tally())
        block = Block(13, [1, 9, 9, 9, 9, 9])
        branching.use(None, {0: state}, {0: block})  # type: ignore[arg-type]
        assert block.length == left


def test_a_request_without_branches_keeps_the_draft_forward() -> None:
    """It is run for that request anyway, and is hardly shorter for one request less."""
    costs = [planned(lambda tokens: 1.0 + tokens * 1e-3, drafted("auto"), *others) for others in ([], [drafted("off")])]
    assert costs[0][0] > 0
    assert costs[1] == [0, 0]


@pytest.mark.parametrize(("branches", "count"), [("off", 0), (3, 3), ("all", 6)])
def test_asked_for_branches_have_no_price(branches: str | int, count: int) -> None:
    calls: list[int] = []
    assert planned(lambda tokens: float(tokens), drafted(branches), calls=calls) == [count]
    assert not calls, "no rank has to wait for another"


def test_replaced_drafts_have_no_branches() -> None:
    one = drafted(3)
    assert planned(lambda tokens: 1.0, one._replace(drafts=[11, 12, 99])) == [0]
    assert planned(lambda tokens: 1.0, one._replace(drafts=[11, 12])) == [3]


def test_a_branch_is_used_for_the_block_that_it_drafted_only() -> None:
    branch = Branch(2, None, 4)
    pending = Pending([1, 2, 3, 4], prefix=10, branches=[branch], beyond=False, left=50)
    assert pending.hit(13, 7) is None, "it was not run"
    pending.hidden[branch] = torch.zeros(4, 8)
    assert pending.hit(13, 7) is branch
    assert pending.hit(17, 7) is None, "an AR step came in between"
    guess = Branch(2, 7, 4)
    pending.hidden[guess] = torch.zeros(4, 8)
    assert pending.hit(13, 7) is guess
    assert pending.hit(13, 8) is branch


def test_a_block_is_done_without_the_position_past_it() -> None:
    block = Block(0, [1, 5, 5])
    block.look_past(5)
    assert (block.length, block.beyond) == (4, 1)
    block.tokens[1:3] = [8, 9]
    assert block.is_done(5)
    block.shorten(2, 3)
    assert (block.tokens, block.beyond) == ([1, 8, 9], 1)
    block.shorten(2, 2)
    assert (block.tokens, block.beyond) == ([1, 8], 0)
