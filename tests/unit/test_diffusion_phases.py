"""The phases of a diffusion request: every transition, and that no other one is possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllm_nld.draft_pass.block import Block
from vllm_nld.proposer.diffusion import DiffusionRequest, Phase

MASK = 99


def block(*tokens: int, passes: int = 3) -> Block:
    return Block(10, list(tokens), passes=passes, pages=torch.zeros(1, dtype=torch.int32))


def done() -> Block:
    return block(1, 2, 3, 4)


def in_phase(phase: Phase, overrules: bool = True) -> DiffusionRequest:
    """A request that came to a phase by transitions; its block, if it has one, is done."""
    made = DiffusionRequest(overrules)
    ways: dict[Phase, list[Callable[[], Any]]] = {
        Phase.IDLE: [],
        Phase.FILLING: [lambda: made.fill(done())],
        Phase.PARKED: [lambda: made.park(done())],
        Phase.INTERRUPTED: [lambda: made.park(done()), made.interrupt],
        Phase.RESUMED: [lambda: made.park(done()), made.interrupt, made.resume],
        Phase.COMMITTING: [lambda: made.fill(done()), lambda: made.hand_out(MASK)],
        Phase.ENDED: [made.end],
    }
    for step in ways[phase]:
        step()
    assert made.phase is phase
    return made


TRANSITIONS: dict[str, tuple[Callable[[DiffusionRequest], Any], dict[Phase, Phase]]] = {
    "fill": (lambda made: made.fill(done()), {Phase.IDLE: Phase.FILLING}),
    "park": (lambda made: made.park(done()), {Phase.IDLE: Phase.PARKED}),
    "interrupt": (lambda made: made.interrupt(), {Phase.PARKED: Phase.INTERRUPTED}),
    "resume": (lambda made: made.resume(), {Phase.INTERRUPTED: Phase.RESUMED}),
    "hand_out": (
        lambda made: made.hand_out(MASK),
        dict.fromkeys((Phase.FILLING, Phase.PARKED, Phase.RESUMED), Phase.COMMITTING),
    ),
    "committed": (lambda made: made.committed(1), {Phase.COMMITTING: Phase.COMMITTING}),
    "take_next": (lambda made: made.take_next(), {Phase.COMMITTING: Phase.COMMITTING}),
    "end": (lambda made: made.end(), {phase: Phase.ENDED for phase in Phase if phase is not Phase.ENDED}),
}


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("name", TRANSITIONS)
def test_transition_leads_to_its_phase_or_is_refused(name: str, phase: Phase) -> None:
    transition, allowed = TRANSITIONS[name]
    made = in_phase(phase)
    if phase in allowed:
        transition(made)
        assert made.phase is allowed[phase]
    else:
        with pytest.raises(RuntimeError, match=f"in phase {phase.name} cannot {name}"):
            transition(made)
        assert made.phase is phase, "a refused transition changes nothing"


def test_every_transition_is_tested() -> None:
    public = {name for name, member in vars(DiffusionRequest).items() if callable(member) and name[0] != "_"}
    assert public == set(TRANSITIONS)


@pytest.mark.parametrize("phase", Phase)
def test_block_is_open_from_fill_or_park_to_hand_out(phase: Phase) -> None:
    made = in_phase(phase)
    if phase in (Phase.FILLING, Phase.PARKED, Phase.INTERRUPTED, Phase.RESUMED):
        assert made.block.tokens == [1, 2, 3, 4]
    else:
        with pytest.raises(RuntimeError, match=f"in phase {phase.name} has no open block"):
            _ = made.block


@pytest.mark.parametrize("phase", Phase)
def test_phases_that_replace_the_sampled_token(phase: Phase) -> None:
    replacing = {Phase.COMMITTING, Phase.INTERRUPTED, Phase.RESUMED}
    assert in_phase(phase).replaces_sampled is (phase in replacing)


def test_block_is_committed_in_several_steps() -> None:
    made = in_phase(Phase.PARKED)
    assert made.hand_out(MASK) == [2, 3, 4], "the first token is decided already"
    made.committed(0)
    assert made.phase is Phase.COMMITTING, "the causal pass was a resumption"
    made.committed(1)
    assert made.take_next() == (3, [4])
    assert made.phase is Phase.COMMITTING
    made.committed(1)
    assert made.phase is Phase.IDLE


def test_last_token_replaces_a_sampled_one() -> None:
    made = in_phase(Phase.PARKED)
    made.hand_out(MASK)
    made.committed(2)
    assert made.take_next() == (4, [])
    assert made.phase is Phase.IDLE


def test_only_decided_tokens_are_handed_out() -> None:
    made = DiffusionRequest(overrules=True)
    made.fill(Block(0, [1, 7, MASK, 4], stop_ids=frozenset({7})))
    assert made.hand_out(MASK) == [7]
    single = DiffusionRequest(overrules=True)
    single.fill(block(1))
    assert single.hand_out(MASK) == []
    assert single.phase is Phase.IDLE, "an unseeded block of one token is decided when it is handed out"


def test_interrupted_block_loses_its_pages_and_goes_on() -> None:
    made = DiffusionRequest(overrules=True)
    made.park(block(1, 2, MASK, 4))
    assert made.interrupt() is None
    resumed = made.resume()
    assert (resumed.tokens, resumed.passes, resumed.pages) == ([1, 2, MASK, 4], 3, None)
    resumed.tokens[2] = 3
    assert made.hand_out(MASK) == [2, 3, 4]
    assert made.take_next() == (2, [3, 4]), "the resumption sampled after the seed"


def test_nothing_is_kept_if_the_causal_pass_is_not_overruled() -> None:
    made = DiffusionRequest(overrules=False)
    made.fill(done())
    assert made.hand_out(MASK) == [2, 3, 4]
    assert made.phase is Phase.IDLE
    made.park(block(1, MASK, passes=5))
    assert made.interrupt() == 5, "forwards of the dropped block"
    assert made.phase is Phase.IDLE


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.ENDED])
def test_end_returns_the_forwards_of_an_open_block(phase: Phase) -> None:
    has_block = phase in (Phase.FILLING, Phase.PARKED, Phase.INTERRUPTED, Phase.RESUMED)
    assert in_phase(phase).end() == (3 if has_block else None)
