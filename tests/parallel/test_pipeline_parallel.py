"""Pipeline parallelism: AR works as with one stage; speculation is refused (test_bad_input.py)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.engines import engine, generate, random_prompts
from tests.support.models import random_model, save, small_config

PROMPTS = random_prompts([1, 40, 90, 17], 24, seed=3)


def test_two_pipeline_stages_give_the_tokens_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three layers, so that the stages differ; more requests than a stage runs at once."""
    folder = save(random_model(small_config(num_hidden_layers=3)), tmp_path)
    settings: dict[str, Any] = {"max_num_seqs": 2}
    with engine(folder, **settings) as alone:
        expected = generate(alone, PROMPTS)
        sampled = generate(alone, PROMPTS, temperature=1.0, seed=4)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1" if os.cpu_count() > 1 else "0|0")
    monkeypatch.setenv("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "200")
    # vLLM's CPU worker makes the buffers between stages when it warms up, which it does not do for eager models. Traced
    # by dynamo without a compiler, the model is warmed up and nothing is compiled.
    settings |= {"enforce_eager": False, "compilation_config": {"mode": "DYNAMO_TRACE_ONCE", "backend": "eager"}}
    with engine(folder, pipeline_parallel_size=2, **settings) as staged:
        layers = staged.collective_rpc(lambda worker: len(worker.get_kv_cache_spec()))
        assert sorted(layers) == [1, 2], "each worker holds the layers of its stage"
        assert generate(staged, PROMPTS) == expected
        assert generate(staged, PROMPTS, temperature=1.0, seed=4) == sampled
