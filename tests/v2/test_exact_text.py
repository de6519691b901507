"""Greedy self-speculation on the second runner is AR's text, token for token, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.engines import generate, random_prompts
from tests.support.models import random_model, save, small_config
from tests.support.second_runner import second_engine
from vllm_nld.reference import ar_generate


@pytest.mark.parametrize("asynchronous", [True, False])
def test_text_is_the_reference_s(asynchronous: bool, tmp_path: Path) -> None:
    model = random_model(small_config(), 1)
    folder = save(model, tmp_path)
    prompts = random_prompts([1, 17, 40], 24, seed=3)
    expected = [ar_generate(model, ids, 16).ids[len(ids) :] for ids in prompts]
    with second_engine(folder, asynchronous=asynchronous) as llm:
        assert generate(llm, prompts, max_tokens=16) == expected
