"""Auto mode on the second runner: it drafts where that pays, and says what it decided."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.engines import counters, generate, random_prompts, runner
from tests.support.models import random_model, save, small_config
from tests.support.second_runner import second_engine
from vllm_nld.reference import ReferenceModel, ar_generate

VOCAB = 24


@pytest.fixture(scope="module")
def model() -> ReferenceModel:
    return random_model(small_config(), 8)


@pytest.fixture(scope="module")
def folder(model: ReferenceModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(model, tmp_path_factory.mktemp("auto"))


@pytest.fixture(params=[True, False], ids=["asynchronous", "synchronous"])
def llm(request: pytest.FixtureRequest, folder: Path) -> Iterator[Any]:
    with second_engine(folder, options={"mode": "auto"}, asynchronous=request.param, max_num_seqs=4) as llm:
        yield llm


class Alternating:
    """Trials that change their mind every third step."""

    def __init__(self) -> None:
        self.steps, self.seen = 0, list[tuple[int, bool, int, bool]]()

    def drafts(self, requests: int) -> bool:
        self.steps += 1
        return self.steps // 3 % 2 == 0

    def saw(self, *step: Any, comparable: bool) -> None:
        self.seen.append((*step, comparable))


def test_text_does_not_depend_on_when_it_drafts(llm: Any, model: ReferenceModel) -> None:
    """Next to a request that always drafts, and without it."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    scheduler.trials = trials = Alternating()
    prompts = random_prompts([5, 17], VOCAB, seed=3)
    expected = [ar_generate(model, ids, 16).ids[len(ids) :] for ids in prompts]
    assert generate(llm, prompts, [{}, {"mode": "self_speculation"}], max_tokens=16) == expected
    assert not any(comparable for requests, *_, comparable in trials.seen if requests == 2)
    assert generate(llm, prompts[:1], max_tokens=16) == expected[:1]
    assert {drafted for _, drafted, _, comparable in trials.seen if comparable} == {True, False}
    told = llm.collective_rpc("nld_tally")[0]
    assert {"ar 1", f"self_speculation {model.config.block_size}"} <= set(told["decisions"])
    assert told["forwards"]["ar"] > 0
    assert told["tokens"]["ar"] > 0


class Settled:
    """Trials that know what pays."""

    def __init__(self, drafts: bool) -> None:
        self.answer = drafts

    def drafts(self, requests: int) -> bool:
        return self.answer

    def saw(self, *step: Any, comparable: bool) -> None:
        pass


def test_the_worker_drafts_nothing_where_ar_pays(
    llm: Any, model: ReferenceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted where drafts are made: draft passes, and the requests in them."""
    speculator = runner(llm).speculator
    slots = list[int]()

    def draft(first: int, count: int, *args: Any, **kwargs: Any) -> None:
        slots.append(count)
        original(first, count, *args, **kwargs)

    original = speculator._draft
    monkeypatch.setattr(speculator, "_draft", draft)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    prompts = random_prompts([5, 17], VOCAB, seed=3)
    expected = [ar_generate(model, ids, 8).ids[len(ids) :] for ids in prompts]

    def passes(drafts: bool, modes: list[dict[str, Any]]) -> set[int]:
        """Return how many requests the draft passes had."""
        slots.clear()
        scheduler.trials, before = Settled(drafts), counters(llm)["draft_forwards"]
        assert generate(llm, prompts[: len(modes)], modes, max_tokens=8) == expected[: len(modes)]
        assert counters(llm)["draft_forwards"] - before == len(slots)
        return set(slots)

    assert passes(False, [{}, {}]) == set()
    assert passes(False, [{}, {"mode": "self_speculation"}]) == {1}
    assert 2 in passes(True, [{}, {}])
