"""Pipeline parallelism: AR works as with one stage; speculation is refused (test_bad_input.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.engines import engine, generate, random_prompts
from tests.support.models import random_model, save, small_config

PROMPTS = random_prompts([1, 40, 90, 17], 24, seed=3)
SETTINGS: dict[str, Any] = {"max_num_seqs": 2}
Texts = list[list[list[int]]]


def texts(llm: Any) -> Texts:
    return [generate(llm, PROMPTS, max_tokens=16), generate(llm, PROMPTS, max_tokens=16, temperature=1.0, seed=4)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three layers, so that the stages differ."""
    return save(random_model(small_config(num_hidden_layers=3)), tmp_path)


@pytest.fixture
def expected(folder: Path) -> Texts:
    """Those of one stage, in this process."""
    with engine(folder, **SETTINGS) as alone:
        return texts(alone)


def test_two_pipeline_stages_give_the_tokens_of_one(folder: Path, expected: Texts, two_ranks_once: None) -> None:
    """With more requests than a stage runs at once."""
    # vLLM's CPU worker makes the buffers between stages when it warms up, which it does not do for eager models. Traced
    # by dynamo without a compiler, the model is warmed up and nothing is compiled.
    settings = SETTINGS | {
        "enforce_eager": False,
        "compilation_config": {"mode": "DYNAMO_TRACE_ONCE", "backend": "eager"},
    }
    with engine(folder, pipeline_parallel_size=2, **settings) as staged:
        layers = staged.collective_rpc(lambda worker: len(worker.get_kv_cache_spec()))
        assert sorted(layers) == [1, 2], "each worker holds the layers of its stage"
        assert texts(staged) == expected
