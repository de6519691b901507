"""Engines on a GPU against the reference, in float32: both runners, eager and with CUDA graphs. Skipped without one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.support.engines import counters, engine, generate, random_prompts, runner
from tests.support.models import random_model, save, small_config
from vllm_nld.reference import ReferenceModel, ar_generate
from vllm_nld.reference.diffusion import generate as diffuse

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
RUNNERS = {"first": "0", "second": "1"}


@pytest.fixture(scope="module")
def model() -> ReferenceModel:
    return random_model(small_config())


@pytest.fixture(scope="module", params=[(name, eager) for name in RUNNERS for eager in (True, False)], ids=str)
def llm(request: pytest.FixtureRequest, model: ReferenceModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """With graphs, the draft pass must get the block table of a step whose Python ``forward`` never ran."""
    name, eager = request.param
    folder = save(model, tmp_path_factory.mktemp("gpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", RUNNERS[name])
        settings = {"enforce_eager": eager, "max_model_len": 256, "max_num_seqs": 8, "enable_prefix_caching": True}
        with engine(folder, spec=True, **settings) as llm:
            assert llm.llm_engine.vllm_config.use_v2_model_runner == (name == "second")
            yield llm


@pytest.mark.parametrize("count", [1, 3, 8])
def test_self_speculation_equals_the_reference(llm: Any, model: ReferenceModel, count: int) -> None:
    """Numbers of requests that fill a graph, and that leave padding."""
    prompts = random_prompts([1, 17, 40, 65, 2, 130, 31, 64][:count], model.config.vocab_size, seed=count)
    expected = [ar_generate(model, ids, 24, eos_token_id=-1).ids[len(ids) :] for ids in prompts]
    before = counters(llm)["draft_forwards"]
    assert generate(llm, prompts, ignore_eos=True) == expected
    assert counters(llm)["draft_forwards"] > before


def test_modes_and_block_lengths_side_by_side(llm: Any, model: ReferenceModel) -> None:
    own: list[dict[str, Any]] = [
        {}, {"mode": "ar"}, {"block_length": 3}, {"mode": "diffusion", "threshold": 0.4}, {"block_length": 5}
    ]  # fmt: skip
    prompts = random_prompts([9, 33, 64, 21, 5], model.config.vocab_size, seed=7)
    expected = [ar_generate(model, ids, 40, eos_token_id=-1).ids[len(ids) :] for ids in prompts]
    settings: dict[str, Any] = {"sampler": "confidence_threshold", "threshold": 0.4, "eos_token_id": -1}
    expected[3] = diffuse(model, prompts[3], 40, **settings).ids[len(prompts[3]) :]
    assert generate(llm, prompts, own, max_tokens=40, ignore_eos=True) == expected


def test_a_seed_gives_its_text_in_any_batch(llm: Any, model: ReferenceModel) -> None:
    prompts = random_prompts([12, 30, 7], model.config.vocab_size, seed=8)
    params: dict[str, Any] = {"temperature": 0.8, "seed": 11, "ignore_eos": True}
    alone = [generate(llm, [prompt], **params)[0] for prompt in prompts]
    assert generate(llm, prompts, **params) == alone
    assert generate(llm, prompts, [{"mode": "ar"}] * 3, **params) == alone


def test_second_runner_drafts_in_graphs(llm: Any) -> None:
    if not llm.llm_engine.vllm_config.use_v2_model_runner or llm.llm_engine.vllm_config.model_config.enforce_eager:
        pytest.skip("no graphs of drafts")
    graphs = runner(llm).speculator._graphs
    assert graphs and all(own.slots_for(8) for own in graphs.values())
    lengths = {found.uniform_token_count for found in runner(llm).cudagraph_manager.graphs}
    assert lengths == {1, runner(llm).decode_query_len}
