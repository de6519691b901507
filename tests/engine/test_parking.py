"""No request waits for another request's diffusion block. Asserted on steps and forwards, never on time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.engines import engine, random_prompts, runner
from tests.support.models import random_model, save, small_config
from vllm_nld.proposer.parking import FORWARDS_PER_LOOK
from vllm_nld.reference import ReferenceModel, ar_generate
from vllm_nld.reference import generate as reference_generate

FAST: dict[str, Any] = {"threshold": 0.0}  # one forward per block
SLOW: dict[str, Any] = {"sampler": "top_k"}  # one token per forward: 15 per block
BLOCK = 16


@pytest.fixture(scope="module")
def model() -> ReferenceModel:
    return random_model(small_config(eos_token_id=None, block_size=BLOCK), seed=3)


@pytest.fixture(scope="module")
def folder(model: ReferenceModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(model, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[Any]:
    with engine(folder, spec=True, max_num_seqs=8) as made:
        yield made


@pytest.fixture
def watched(shared: Any) -> Iterator[Watched]:
    watch = Watched(shared)
    yield watch
    watch.release()


class Watched:
    """An engine that runs step by step, with a record of its steps.

    ``scheduled`` holds the requests of every step, ``forwards`` the denoising forwards of every step, ``tokens`` all
    tokens so far.
    """

    def __init__(self, llm: Any) -> None:
        self.engine, self.drafter = llm.llm_engine, runner(llm).drafter
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.scheduled: list[set[str]] = []
        self.forwards: list[int] = []
        self.tallies: dict[str, Any] = {}
        self.tokens: dict[str, list[int]] = {}
        self._schedule, self._finish = self.scheduler.schedule, self.drafter._requests.finish
        self.scheduler.schedule, self.drafter._requests.finish = self.schedule, self.finish

    def release(self) -> None:
        self.scheduler.schedule, self.drafter._requests.finish = self._schedule, self._finish

    def schedule(self, *args: Any) -> Any:
        output = self._schedule(*args)
        self.scheduled.append({name(request_id) for request_id in output.num_scheduled_tokens})
        return output

    def finish(self, request_id: str) -> Any:
        state = self._finish(request_id)
        if state is not None:
            self.tallies[name(request_id)] = state.tally
        return state

    def add(self, request_id: str, prompt: list[int], budget: int, nld: dict[str, Any] | None, **params: Any) -> None:
        from vllm import SamplingParams

        options = {"mode": "ar"} if nld is None else {"mode": "diffusion", **nld}
        settings = SamplingParams(
            temperature=0, max_tokens=budget, detokenize=False, extra_args={"nld": options}, **params
        )
        self.tokens[request_id] = []
        self.engine.add_request(request_id, {"prompt_token_ids": prompt}, settings)

    def step(self) -> list[str]:
        """Run one step; return the requests that ended."""
        before = self.drafter.draft_pass.forwards
        ended = []
        for output in self.engine.step():
            self.tokens[output.request_id] = list(output.outputs[0].token_ids)
            ended += [output.request_id] * output.finished
        self.forwards.append(self.drafter.draft_pass.forwards - before)
        return ended

    def until(self, condition: Callable[[], bool], limit: int = 300) -> None:
        while not condition():
            assert len(self.forwards) < limit, f"stuck: {self.scheduled[-3:]}, parked {self.parked()}"
            self.step()

    def drain(self) -> None:
        """Run to the end, and one more step, in which the worker learns of the last request's end."""
        self.until(lambda: not self.engine.has_unfinished_requests())
        self.add("last", [1, 2], 1, None)
        self.until(lambda: not self.engine.has_unfinished_requests())
        assert not self.drafter.parked
        assert not self.scheduler.parked

    def parked(self) -> set[str]:
        return {name(request_id) for request_id in self.drafter.parked.ids}

    def denoised(self, request_id: str) -> int:
        """Denoising forwards counted for a request that ended."""
        return int(self.tallies[request_id].forwards["denoise"])

    def passes(self) -> list[int]:
        """Forwards that the open blocks have taken."""
        return [block.passes for block in self.drafter.parked.blocks]


def name(request_id: str) -> str:
    """The id that the test gave; vLLM appends a random part."""
    return request_id.rpartition("-")[0] or request_id


def expect(model: ReferenceModel, prompt: list[int], budget: int, nld: dict[str, Any] | None) -> list[int]:
    if nld is None:
        return ar_generate(model, prompt, budget).ids[len(prompt) :]
    return reference_generate(model, prompt, budget, **nld).ids[len(prompt) :]


PROMPTS = random_prompts([40, 3, 90, 17, 64, 130, 1, 30], 24, seed=5)


def test_fast_request_ends_while_slow_one_denoises_its_first_block(watched: Watched, model: ReferenceModel) -> None:
    watched.add("slow", PROMPTS[0], 40, SLOW)
    watched.add("fast", PROMPTS[1], 49, FAST)
    ended: list[str] = []
    while not ended:
        ended = watched.step()
    assert ended == ["fast"]
    assert len(watched.tokens["slow"]) == 1, "the seed, which the prefill yields"
    assert 0 < watched.passes()[0] < BLOCK - 1
    assert watched.scheduled[1:] == [{"fast"}] * 3, "three blocks, each denoised by one forward"
    watched.drain()
    assert watched.tokens["slow"] == expect(model, PROMPTS[0], 40, SLOW)
    assert watched.tokens["fast"] == expect(model, PROMPTS[1], 49, FAST)


def test_ar_decodes_a_token_per_step_next_to_an_open_block(watched: Watched, model: ReferenceModel) -> None:
    watched.add("slow", PROMPTS[0], 40, SLOW)
    watched.add("ar", PROMPTS[1], 60, None)
    watched.step()
    while watched.parked():
        before = len(watched.tokens["ar"])
        watched.step()
        assert len(watched.tokens["ar"]) == before + 1
        assert watched.forwards[-1] == 1
        assert "ar" in watched.scheduled[-1]
        if len(watched.forwards) == BLOCK - 1:
            break
    assert watched.forwards == [1] * (BLOCK - 1)
    assert watched.scheduled[1:] == [{"ar"}] * (BLOCK - 2)
    watched.step()
    assert watched.scheduled[-1] == {"ar", "slow"}, "the block is done, and committed at once"
    assert len(watched.tokens["slow"]) == BLOCK + 1
    watched.drain()
    assert watched.tokens["slow"] == expect(model, PROMPTS[0], 40, SLOW)
    assert watched.tokens["ar"] == expect(model, PROMPTS[1], 60, None)


MIX: list[dict[str, Any]] = [
    FAST, SLOW, {"threshold": 0.3}, {"sampler": "top_k", "tokens_per_step": 4}, {"threshold": 0.3, "seed_first": False},
    {"threshold": 0.9, "block_length": 5}, {"sampler": "left_to_right", "max_denoising_steps": 3}, {"threshold": 0.2},
]  # fmt: skip


def test_blocks_of_every_depth_in_one_batch(watched: Watched, model: ReferenceModel) -> None:
    """Texts and forwards equal those of the request by itself, and no request waits for the slowest."""
    for index, (prompt, nld) in enumerate(zip(PROMPTS, MIX, strict=True)):
        watched.add(str(index), prompt, 50, nld)
    watched.drain()
    for index, (prompt, nld) in enumerate(zip(PROMPTS, MIX, strict=True)):
        expected = reference_generate(model, prompt, 50, **nld)
        commits = sum(str(index) in scheduled for scheduled in watched.scheduled) - 1  # one was the prefill
        assert watched.tokens[str(index)] == expected.ids[len(prompt) :], nld
        assert watched.denoised(str(index)) + commits == expected.nfe, nld


def test_new_request_is_served_while_all_others_are_parked(watched: Watched, model: ReferenceModel) -> None:
    watched.add("slow", PROMPTS[0], 40, SLOW)
    watched.step()
    assert watched.parked() == {"slow"}
    assert watched.forwards == [FORWARDS_PER_LOOK], "no other request had work"
    watched.add("new", PROMPTS[1], 5, None)
    watched.step()
    assert watched.scheduled[-1] == {"new"}
    assert watched.forwards[-1] == 1
    watched.drain()
    assert watched.tokens["new"] == expect(model, PROMPTS[1], 5, None)
    assert watched.tokens["slow"] == expect(model, PROMPTS[0], 40, SLOW)


@pytest.mark.parametrize("how", ["abort", "max_tokens"])
def test_denoising_continues_when_the_only_other_request_ends(
    watched: Watched, model: ReferenceModel, how: str
) -> None:
    """The next step has nothing to schedule, and vLLM asks for drafts only after steps with tokens."""
    watched.add("slow", PROMPTS[0], 40, SLOW)
    watched.add("slower", PROMPTS[2], 40, SLOW)
    watched.add("ar", PROMPTS[1], 100 if how == "abort" else 3, None)
    for _ in range(3):
        watched.step()
    assert watched.parked() == {"slow", "slower"}
    if how == "abort":
        watched.engine.abort_request(["ar"])
    watched.drain()
    assert set() in watched.scheduled
    assert watched.tokens["slow"] == expect(model, PROMPTS[0], 40, SLOW)
    assert watched.tokens["slower"] == expect(model, PROMPTS[2], 40, SLOW)


def test_abort_of_a_parked_request(watched: Watched, model: ReferenceModel) -> None:
    before = dict(watched.drafter.ledger.total.forwards)
    watched.add("gone", PROMPTS[0], 40, SLOW)
    watched.add("ar", PROMPTS[1], 20, None)
    for _ in range(4):
        watched.step()
    assert watched.parked() == {"gone"}
    (passes,) = watched.passes()
    watched.engine.abort_request(["gone"])
    watched.step()
    assert not watched.parked()
    assert watched.denoised("gone") == passes, "forwards that ran count, although the block was dropped"
    watched.add("new", PROMPTS[2], 40, SLOW)
    watched.drain()
    assert watched.tokens["ar"] == expect(model, PROMPTS[1], 20, None)
    assert watched.tokens["new"] == expect(model, PROMPTS[2], 40, SLOW)
    spent = watched.drafter.ledger.total.forwards["denoise"] - before.get("denoise", 0)
    assert spent == passes + watched.denoised("new")


@pytest.mark.parametrize("logprobs", [None, 1])
def test_preemption_of_a_parked_request(watched: Watched, model: ReferenceModel, logprobs: int | None) -> None:
    """The open block continues where it was; with log-probabilities it is dropped, and another one is opened."""
    watched.add("slow", PROMPTS[0], 40, SLOW, logprobs=logprobs)
    watched.add("ar", PROMPTS[1], 20, None)
    for _ in range(6):
        watched.step()
    assert watched.passes() == [6]
    assert watched.scheduler.reset_prefix_cache(reset_running_requests=True)
    watched.drain()
    assert watched.tokens["ar"] == expect(model, PROMPTS[1], 20, None)
    expected = reference_generate(model, PROMPTS[0], 40, **SLOW)
    if logprobs is None:
        assert watched.tokens["slow"] == expected.ids[len(PROMPTS[0]) :]
        assert watched.denoised("slow") == 15 + 15 + 7 == expected.nfe - 3, "three blocks, and their commits"
    else:
        assert len(watched.tokens["slow"]) == 40
        assert watched.denoised("slow") > 15 + 15 + 7


def test_full_cache_preempts_parked_requests(folder: Path, model: ReferenceModel) -> None:
    prompts = random_prompts([60, 61, 62, 63], 24, seed=21)
    kinds: list[dict[str, Any] | None] = [None, SLOW, {"threshold": 0.3}, SLOW]
    with engine(folder, spec=True, block_size=32, num_gpu_blocks_override=14, max_model_len=224) as llm:
        watched = Watched(llm)
        interrupted: list[str] = []
        original = watched.drafter.parked.drop

        def drop(request_id: str) -> Any:
            state = original(request_id)
            interrupted.extend([name(request_id)] * (state is not None))
            return state

        watched.drafter.parked.drop = drop
        for index, (prompt, nld) in enumerate(zip(prompts, kinds, strict=True)):
            watched.add(str(index), prompt, 120, nld)
        watched.until(lambda: not watched.engine.has_unfinished_requests(), limit=2000)
    assert interrupted
    for index, (prompt, nld) in enumerate(zip(prompts, kinds, strict=True)):
        assert watched.tokens[str(index)] == expect(model, prompt, 120, nld), nld


def test_parked_requests_keep_their_slots_in_the_batch(folder: Path, model: ReferenceModel) -> None:
    """Two slots, six requests: parked requests count as running, so at most two run at a time."""
    kinds = [SLOW, FAST, None, SLOW, {"threshold": 0.3}, SLOW]
    with engine(folder, spec=True, max_num_seqs=2) as llm:
        watched = Watched(llm)
        most = 0
        for index, nld in enumerate(kinds):
            watched.add(str(index), PROMPTS[index], 40, nld)
        while watched.engine.has_unfinished_requests():
            watched.step()
            most = max(most, len(watched.scheduled[-1] | watched.parked()), len(watched.scheduler.running))
            assert len(watched.forwards) < 300
        assert most == 2
        first = watched.scheduled.index({"2"})
        assert "0" not in set().union(*watched.scheduled[1:first]), "a waiting request came in while another was parked"
    for index, nld in enumerate(kinds):
        assert watched.tokens[str(index)] == expect(model, PROMPTS[index], 40, nld), nld


def test_another_scheduler_turns_parking_off(folder: Path, model: ReferenceModel) -> None:
    with engine(folder, spec=True, scheduler_cls="vllm.v1.core.sched.scheduler.Scheduler") as llm:
        watched = Watched(llm)
        assert not watched.drafter.parks
        watched.add("slow", PROMPTS[0], 40, SLOW)
        watched.add("ar", PROMPTS[1], 20, None)
        watched.until(lambda: not watched.engine.has_unfinished_requests())
        assert watched.forwards[0] == BLOCK - 1
    assert watched.tokens["slow"] == expect(model, PROMPTS[0], 40, SLOW)
    assert watched.tokens["ar"] == expect(model, PROMPTS[1], 20, None)
