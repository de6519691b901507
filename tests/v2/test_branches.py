"""Branches on the second runner: AR's text, one forward a cycle, and the reference's cycles and hits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.adapters import random_adapter
from tests.support.engines import branches, counters, generate, random_prompts, runner
from tests.support.models import random_model, save, small_config
from tests.support.second_runner import second_engine
from vllm_nld.branches.places import Choice, every_place, likeliest_places
from vllm_nld.checkpoints.draft_lora import FOLDER, TARGETS
from vllm_nld.reference import ReferenceModel, ar_generate, branch_spec_generate

VOCAB, LENGTH = 24, 20
WAYS: dict[str, tuple[dict[str, Any], Choice, bool]] = {
    "three": ({"branches": 3}, likeliest_places(3, 8), True),
    "short": ({"branches": 6, "branch_length": 4}, likeliest_places(6, 4), True),
    "all": ({"branches": "all"}, every_place(8), False),
}
PROMPTS = dict(zip(WAYS, random_prompts([1, 70, 21], VOCAB, seed=7), strict=True))


@pytest.fixture(scope="module")
def model() -> ReferenceModel:
    return random_model(small_config(block_size=8), seed=3)


@pytest.fixture(scope="module", params=[True, False], ids=["asynchronous", "synchronous"])
def llm(request: pytest.FixtureRequest, model: ReferenceModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """An engine with an adapter on all projections and for the mask's row."""
    folder = save(model, tmp_path_factory.mktemp("branches"))
    model.draft_adapter = random_adapter(model.config, targets=TARGETS, mask_row=True)
    model.draft_adapter.write(folder / FOLDER, "somewhere")
    with second_engine(folder, asynchronous=request.param, max_num_batched_tokens=160) as llm:
        yield llm


def texts(model: ReferenceModel, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    return [ar_generate(model, ids, tokens).ids[len(ids) :] for ids in prompts]


def expected_hits(model: ReferenceModel, prompt: list[int], way: str) -> list[str]:
    """The reference's cycles up to a length, by what was hit; it goes on a little, as an engine's drafts do."""
    _, choose, look_past = WAYS[way]
    found = branch_spec_generate(model, prompt, choose, LENGTH + 17, look_past=look_past, misses_draft=False)
    made, hits = 1, []
    for tokens, hit in zip(found.accepted, found.hits, strict=True):
        if made < LENGTH:
            hits.append(hit)
        made += tokens
    return hits


@pytest.mark.parametrize("way", WAYS)
def test_cycles_are_the_reference_s(llm: Any, model: ReferenceModel, way: str) -> None:
    """One forward a cycle, and no draft forward; hits by kind."""
    prompt, hits = PROMPTS[way], expected_hits(model, PROMPTS[way], way)
    before, counted = counters(llm), branches(llm)
    assert generate(llm, [prompt], [WAYS[way][0]], max_tokens=LENGTH) == texts(model, [prompt], LENGTH)
    spent = {key: value - before[key] for key, value in counters(llm).items()}
    assert spent["draft_forwards"] == 0
    late = llm.llm_engine.vllm_config.scheduler_config.async_scheduling  # a step may be on its way at the end
    assert spent["target_forwards"] - 1 - len(hits) in ((0, 1) if late else (0,))
    found = branches(llm) - counted
    for kind in ("guess", "mask"):
        assert found[kind] - hits.count(kind) in ((0, 1) if late else (0,))
    assert found["tokens"] >= found["run"] > 0


def test_a_batch_of_all_kinds_of_requests(llm: Any, model: ReferenceModel) -> None:
    """Some branch, others do not; prompts are cut into pieces; at times there is no room for branches."""
    prompts = random_prompts([5, 110, 33, 9, 64, 101], VOCAB, seed=2)
    each: list[dict[str, Any]] = [own for own, _, _ in WAYS.values()] + [{"mode": "ar"}, {}, {"branches": 2}]
    counted = branches(llm)
    assert generate(llm, prompts, each, max_tokens=14) == texts(model, prompts, 14)
    found = branches(llm) - counted
    assert found["guess"] + found["mask"] > 8


def test_texts_end_at_the_engine_s_last_position(llm: Any, model: ReferenceModel) -> None:
    prompts = random_prompts([120, 126, 127, 113], VOCAB, seed=5)
    each = [{"branches": 3}, {"branches": "all"}, {"branches": 2}, {"branches": 5}]
    assert generate(llm, prompts, each, max_tokens=50) == [texts(model, [ids], 128 - len(ids))[0] for ids in prompts]


def test_without_room_requests_draft_by_themselves(llm: Any, model: ReferenceModel) -> None:
    """Room for branches of nobody: draft forwards, as without branches."""
    prompts = random_prompts([9, 12], VOCAB, seed=4)
    branching = runner(llm).speculator.branching
    most, branching.max_tokens = branching.max_tokens, 24
    before = counters(llm)
    try:
        assert generate(llm, prompts, [{"branches": 3}] * 2, max_tokens=9) == texts(model, prompts, 9)
    finally:
        branching.max_tokens = most
    assert counters(llm)["draft_forwards"] > before["draft_forwards"]
