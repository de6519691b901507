"""When denoising stops for a causal pass, and the notes that worker and scheduler exchange."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vllm_nld.draft_pass.block import Block
from vllm_nld.errors import NLDError
from vllm_nld.proposer.diffusion import DiffusionRequest
from vllm_nld.proposer.parking import FORWARDS_PER_LOOK, Parked, SchedulerNote, WorkerNote, may_leave
from vllm_nld.vllm_glue import scheduling, steps

MASK = 99
OPEN, DONE = [1, MASK], [1, 2]
VLLM_S = "vllm.v1.core.sched.scheduler.Scheduler"


def parked(*blocks: list[int]) -> Parked:
    made = Parked()
    for index, tokens in enumerate(blocks):
        state = SimpleNamespace(request_id=str(index), diffusion=DiffusionRequest(overrules=True))
        made.park(cast(Any, state), Block(0, list(tokens)))
    return made


@pytest.mark.parametrize(
    ("forwards", "step", "away", "others", "leaves"),
    [
        (1, [], [OPEN], True, True),
        (1, [], [OPEN, OPEN], False, False),
        (1, [], [OPEN, DONE], False, True),
        (FORWARDS_PER_LOOK, [], [OPEN], False, True),
        (FORWARDS_PER_LOOK + 9, [OPEN], [DONE], True, False),
        (1, [DONE], [OPEN], True, True),
    ],
)
def test_causal_pass_is_due_when_it_has_work(
    forwards: int, step: list[list[int]], away: list[list[int]], others: bool, leaves: bool
) -> None:
    unfinished = [Block(0, list(tokens)) for tokens in step]
    assert may_leave(forwards, unfinished, parked(*away), others, MASK) is leaves


def test_finished_blocks_are_taken_once() -> None:
    requests = parked(OPEN, DONE, OPEN)
    assert [state.request_id for state in requests.take_done(MASK)] == ["1"]
    assert requests.take_done(MASK) == []
    assert requests.ids == {"0", "2"}
    assert requests.drop("0") is not None
    assert requests.drop("0") is None
    assert len(requests) == 1


def test_notes_are_carried_by_vllm_objects() -> None:
    """They are pickled between processes, and all empty steps share one output object."""
    from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT

    note = WorkerNote(frozenset({"a"}), {"b": [1, 2]})
    noted = pickle.loads(pickle.dumps(steps.with_note(EMPTY_MODEL_RUNNER_OUTPUT, note)))
    assert steps.note_on(noted) == note
    assert steps.note_on(EMPTY_MODEL_RUNNER_OUTPUT) is None


def test_object_without_attributes_is_refused() -> None:
    class Closed:
        __slots__ = ()

    with pytest.raises(NLDError, match="Closed takes no attributes"):
        steps.with_note(Closed(), SchedulerNote())


def test_installed_vllm_can_park() -> None:
    assert scheduling.parking_obstacle() is None
    config = SimpleNamespace(scheduler_config=SimpleNamespace(scheduler_cls=None), lora_config=None)
    assert not scheduling.parks_requests(config)
    scheduling.use_scheduler_subclass(config.scheduler_config)
    assert config.scheduler_config.scheduler_cls == scheduling.SCHEDULER
    assert scheduling.parks_requests(config)
    config.lora_config = object()
    assert not scheduling.parks_requests(config), "vLLM counts the LoRAs of a step"
    assert scheduling.schedules_blocks(config.scheduler_config)
    config.scheduler_config.scheduler_cls = VLLM_S
    config.lora_config = None
    scheduling.use_scheduler_subclass(config.scheduler_config)
    assert config.scheduler_config.scheduler_cls == VLLM_S, "the user's choice"
    assert not scheduling.parks_requests(config)
