"""Greedy self-speculation on the second runner: AR's text, the reference's drafts and acceptance counts, in float32."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.engines import accepted, generate, metric, random_prompts, runner
from tests.support.models import random_model, save, small_config
from tests.support.second_runner import second_engine, watch_drafts
from vllm_nld.reference import ReferenceModel, ar_generate
from vllm_nld.reference.generate import draft_block, ids_tensor
from vllm_nld.reference.model import KVCache

VOCAB = 24


@pytest.fixture(scope="module")
def model() -> ReferenceModel:
    return random_model(small_config(), 1)


@pytest.fixture(scope="module")
def folder(model: ReferenceModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(model, tmp_path_factory.mktemp("second"))


@pytest.fixture(scope="module", params=[True, False], ids=["asynchronous", "synchronous"])
def llm(request: pytest.FixtureRequest, folder: Path) -> Iterator[Any]:
    """An engine whose steps hold two prompts' chunks at most, with a prefix cache of pages of 32 tokens."""
    settings: dict[str, Any] = {"max_num_batched_tokens": 48, "enable_prefix_caching": True, "block_size": 32}
    with second_engine(folder, asynchronous=request.param, **settings) as llm:
        yield llm


def texts(model: ReferenceModel, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    return [ar_generate(model, ids, tokens).ids[len(ids) :] for ids in prompts]


def reference_drafts(model: ReferenceModel, text: list[int], length: int) -> list[int]:
    """What the reference drafts after a text whose last token is the seed."""
    cache = KVCache()
    if len(text) > 1:
        model.causal(ids_tensor(model, text[:-1]), cache)
    return draft_block(model, cache, text[-1], length)[0][1:]


def cycles(text: list[int], start: int, drafts: dict[int, list[int]]) -> tuple[int, int]:
    """Return how many blocks a text takes after ``start`` tokens, and how many drafts it accepts."""
    blocks = taken = 0
    place = start
    while place < len(text):
        ahead = drafts[place]
        count = next((n for n, token in enumerate(ahead) if text[place + n : place + n + 1] != [token]), len(ahead))
        blocks, taken, place = blocks + 1, taken + count, place + count + 1
    return blocks, taken


def test_text_is_the_reference_s_over_mixed_batches(llm: Any, model: ReferenceModel) -> None:
    """Prompts of one token to several chunks, AR next to blocks of several lengths, more requests than places."""
    prompts = random_prompts([1, 17, 70, 33, 2, 16], VOCAB, seed=3)
    each = [{}, {"mode": "ar"}, {"block_length": 3}, {"block_length": 5}, {"mode": "ar"}, {}]
    assert generate(llm, prompts, each, max_tokens=14) == texts(model, prompts, 14)


def test_the_prefix_cache_changes_nothing(llm: Any, model: ReferenceModel) -> None:
    """Prompts that are cached whole, in part, and up to one token."""
    (prompt,) = random_prompts([64], VOCAB, seed=11)
    prompts = [prompt, prompt, prompt[:33], [*prompt[:45], 7, 8]]
    for _ in range(2):
        assert generate(llm, prompts, max_tokens=9) == texts(model, prompts, 9)


def test_texts_end_at_the_engine_s_last_position(llm: Any, model: ReferenceModel) -> None:
    prompts = random_prompts([120, 126, 127, 119], VOCAB, seed=5)
    found = generate(llm, prompts, max_tokens=50)
    assert found == [texts(model, [ids], 128 - len(ids))[0] for ids in prompts]


def test_drafts_and_acceptance_are_the_reference_s(llm: Any, model: ReferenceModel) -> None:
    prompts = random_prompts([21, 5], VOCAB, seed=8)
    before = accepted(llm), metric(llm, "vllm:spec_decode_num_drafts")
    with watch_drafts(llm) as seen:
        found = generate(llm, prompts, [{}, {"block_length": 4}], max_tokens=13)
    assert found == texts(model, prompts, 13)
    blocks = taken = 0
    for prompt, text, length in zip(prompts, found, (8, 4), strict=True):
        whole = prompt + text
        drafts = {
            place: reference_drafts(model, whole[:place], length) for place in range(len(prompt) + 1, len(whole) + 1)
        }
        own = {place: ids for (start, place), ids in seen.items() if start == tuple(prompt[:3])}
        assert own and all(ids == drafts[place] for place, ids in own.items() if place in drafts)
        count, good = cycles(whole, len(prompt) + 1, drafts)
        blocks, taken = blocks + count, taken + good
    # The last block's drafts may reach past the end of the text: vLLM counts those it has verified.
    assert metric(llm, "vllm:spec_decode_num_drafts") - before[1] == blocks
    assert taken <= accepted(llm) - before[0] <= taken + 8 + 4


def test_preempted_requests_go_on(folder: Path, model: ReferenceModel) -> None:
    """A cache of five pages for three texts of three."""
    prompts = random_prompts([50, 52, 54], VOCAB, seed=2)
    with second_engine(folder, block_size=32, num_gpu_blocks_override=6) as llm:
        assert generate(llm, prompts, max_tokens=30) == texts(model, prompts, 30)
        assert metric(llm, "vllm:num_preemptions") > 0


def test_aborted_requests_leave_the_others_alone(llm: Any, model: ReferenceModel) -> None:
    from vllm import SamplingParams

    prompts = random_prompts([9, 12, 30, 4], VOCAB, seed=6)
    engine = llm.llm_engine
    for index, prompt in enumerate(prompts):
        params = SamplingParams(temperature=0, max_tokens=20, detokenize=False)
        engine.add_request(f"abort-{index}", {"prompt_token_ids": prompt}, params)
    rng, found, steps = random.Random(0), {}, 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                found[output.request_id] = list(output.outputs[0].token_ids)
        steps += 1
        if steps in (2, 4):
            engine.abort_request([f"abort-{rng.choice((0, 1)) if steps == 2 else 3}"])
    expected = texts(model, prompts, 20)
    whole = {name: ids for name, ids in found.items() if len(ids) == 20}
    assert "abort-2" in whole and len(whole) >= 2
    assert all(ids == expected[int(name[-1])][: len(ids)] for name, ids in found.items())
    assert runner(llm).speculator.table is not None
