"""Shares of a step's budget, and steps that another scheduler padded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams

from vllm_nld import scheduler as own_scheduler
from vllm_nld.errors import NLDError
from vllm_nld.model.engine_config import _check_budget
from vllm_nld.options import NLDOptions
from vllm_nld.scheduler import NLDScheduler, fair_shares
from vllm_nld.serving.admission import EngineTraits
from vllm_nld.vllm_glue import padding, scheduling
from vllm_nld.vllm_glue.padding import grammar_without_padding, schedule_unpadded, without_padding

VLLM_S = "vllm.v1.core.sched.scheduler.Scheduler"


@pytest.mark.parametrize(
    ("wanted", "budget", "shares"),
    [
        ([16] * 8, 64, [8] * 8),
        ([16, 1, 16, 1], 64, [16, 1, 16, 1]),
        ([16, 1, 16, 1], 20, [9, 1, 9, 1]),
        ([1, 3, 500], 30, [1, 3, 26]),
        ([16, 16, 16], 20, [6, 7, 7]),
        ([], 20, []),
    ],
)
def test_scarce_budget_is_shared(wanted: list[int], budget: int, shares: list[int]) -> None:
    assert fair_shares(wanted, budget) == shares


def step(**drafted: list[int]) -> Any:
    scheduled = {name: 1 + len(ids) for name, ids in drafted.items()} | {"plain": 1}
    return SimpleNamespace(
        scheduled_spec_decode_tokens=dict(drafted),
        num_scheduled_tokens=scheduled,
        total_num_scheduled_tokens=sum(scheduled.values()),
    )


@pytest.mark.parametrize(
    ("release", "kept"), [((0, 26), [0, 1, 5, 6, 7, 8, 9]), ((0, 32), [0, 1, 5, 6, 7, 8, 9]), ((0, 33), [*range(10)])]
)
def test_padding_is_removed_from_step_and_grammar(
    release: tuple[int, int], kept: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bitmask has its own order; requests without drafts have one row.

    vLLM 0.33 gives every request an equal number of rows, and reads the first ones, so all stay.
    """
    monkeypatch.setattr(padding, "installed_release", lambda: release)
    planned = step(a=[7, 8], b=[-1, -1, -1], c=[9])
    own = without_padding(planned)
    assert own.scheduled_spec_decode_tokens == {"a": [7, 8], "c": [9]}
    assert own.num_scheduled_tokens == {"a": 3, "b": 1, "c": 2, "plain": 1}
    assert own.total_num_scheduled_tokens == 7
    assert planned.total_num_scheduled_tokens == 10, "the scheduler takes its padding back by itself"
    rows = np.arange(10, dtype=np.int32)[:, None]
    sent = SimpleNamespace(structured_output_request_ids=["plain", "b", "c", "a"], grammar_bitmask=rows)
    assert grammar_without_padding(sent, planned).grammar_bitmask[:, 0].tolist() == kept
    assert len(sent.grammar_bitmask) == 10


def test_step_without_padding_is_not_changed() -> None:
    planned = step(a=[7, 8])
    sent = SimpleNamespace(structured_output_request_ids=["a"], grammar_bitmask=np.zeros((3, 1), np.int32))
    assert without_padding(planned) is planned
    assert grammar_without_padding(sent, planned) is sent
    assert grammar_without_padding(None, step(a=[-1])) is None


def config(budget: int, scheduler: str | None, device: str = "cpu", lora: Any = None) -> Any:
    return SimpleNamespace(
        device_config=SimpleNamespace(device_type=device),
        lora_config=lora,
        scheduler_config=SimpleNamespace(max_num_batched_tokens=budget, scheduler_cls=scheduler),
        speculative_config=SimpleNamespace(num_speculative_tokens=15),
    )


def test_budget_below_a_block_needs_this_scheduler() -> None:
    _check_budget(config(15, scheduling.SCHEDULER))
    _check_budget(config(16, VLLM_S))
    with pytest.raises(NLDError, match=r"max_num_batched_tokens=15 with scheduler_cls='vllm.*a block of 16 tokens"):
        _check_budget(config(15, VLLM_S))


@pytest.mark.parametrize(("device", "lora"), [("cuda", None), ("cpu", object())])
def test_budget_below_a_block_needs_a_forward_of_any_size(device: str, lora: Any) -> None:
    _check_budget(config(16, scheduling.SCHEDULER, device, lora))
    with pytest.raises(NLDError, match=r"max_num_batched_tokens=15 .*use at least 16"):
        _check_budget(config(15, scheduling.SCHEDULER, device, lora))


def test_scheduler_with_unknown_padding_is_refused() -> None:
    with pytest.raises(NLDError, match="num_spec_tokens"):
        schedule_unpadded(SimpleNamespace(), lambda: None)


def request(name: str, drafts: int = 0, **params: Any) -> Any:
    """A request whose first ten tokens are decided, the last of them not computed yet."""
    return SimpleNamespace(
        request_id=name,
        sampling_params=SamplingParams(**({"temperature": 0.0} | params)),
        spec_token_ids=[7] * drafts,
        num_tokens=10,
        num_computed_tokens=9,
        num_tokens_with_spec=10 + drafts,
    )


DIFFUSION = {"extra_args": {"nld": {"mode": "diffusion"}}}


@pytest.mark.parametrize(
    ("running", "waiting", "places", "drafts"),
    [
        ({}, {}, 4, 15),
        ({}, {"temperature": 1.0}, 4, 4),
        ({}, {"logprobs": 0}, 4, 4),
        ({}, {"temperature": 1.0}, 2, 15),
        ({"min_tokens": 5}, {}, 2, 4),
        (DIFFUSION, {}, 2, 4),
    ],
)
def test_verified_rows_are_limited_by_requests_of_the_next_step(
    monkeypatch: pytest.MonkeyPatch, running: Any, waiting: Any, places: int, drafts: int
) -> None:
    """If a request joins a batch of greedy ones, all their drafts go through the rejection sampler."""
    monkeypatch.setattr(own_scheduler, "DRAWN_BYTES", 8 * 4 * 100)
    made = NLDScheduler.__new__(NLDScheduler)
    made.vllm_config = SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: 100))
    made.running = [request("a", 15), request("b", 15, **running)]
    made.waiting = [request("c", **waiting)]
    made.waiting = type("Queue", (list,), {"peek_request": lambda self: self[0]})(made.waiting)
    made.requests = {own.request_id: own for own in [*made.running, *made.waiting]}
    made.parked, made._drafters, made._argmax = frozenset(), set(), {}
    made._traits = EngineTraits(NLDOptions(), 16)
    made.max_num_scheduled_tokens, made.max_num_running_reqs = 1000, places
    made._share_budget()
    assert [len(own.spec_token_ids) for own in made.running] == [drafts] * 2
