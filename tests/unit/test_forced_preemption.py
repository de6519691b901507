"""How many outputs vLLM 0.26 drops of a request that was preempted by force while steps were in flight."""

from __future__ import annotations

from types import SimpleNamespace

from vllm_nld.vllm_glue.forced_preemption import StepsInFlight


def request(name: str, places: int) -> SimpleNamespace:
    """A request as vLLM 0.26 leaves it: with one output to drop for each place, of which a step has 1 + drafts."""
    return SimpleNamespace(request_id=name, async_tokens_to_discard=places)


def test_one_output_is_dropped_for_each_step_in_flight() -> None:
    steps = StepsInFlight()
    steps.planned(["a", "b"])
    steps.planned(["a"])
    steps.came()
    steps.planned(["a", "c"])
    found = [request("a", 8), request("b", 4), request("c", 1)]
    steps.correct(found)
    assert [one.async_tokens_to_discard for one in found] == [2, 0, 1]


def test_later_versions_are_left_alone() -> None:
    steps, later = StepsInFlight(), SimpleNamespace(request_id="a")
    steps.planned(["a"])
    steps.correct([later])
    assert vars(later) == {"request_id": "a"}
