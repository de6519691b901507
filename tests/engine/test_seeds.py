"""A seeded request's text equals AR's with that seed, for any preemptions, cut budgets, drafts and other requests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.engines import accepted, engine, metric, random_prompts, shun_ar
from tests.support.models import random_model, save, small_config

PROMPTS = random_prompts([60, 70, 80, 90], 24, seed=6)
TOKENS = 40
WAYS: dict[str, dict[str, Any]] = {
    "AR": {"mode": "ar"},
    "self-speculation": {},
    "short blocks": {"block_length": 3},
    "most probable drafts": {"sampled_drafts": False},
    "branches": {"branches": 3},
    "several draft forwards": {"draft_threshold": 0.5},
    "lengths by the clock": {"mode": "auto"},
    "looked-up drafts": {"mode": "auto", "prompt_lookup": 1},
    "diffusion": {"mode": "diffusion", "threshold": 0.3},
    "unseeded blocks": {"mode": "diffusion", "threshold": 0.3, "seed_first": False},
}
LOSSLESS = [way for way, options in WAYS.items() if options.get("mode") != "diffusion"]


def sampled(options: dict[str, Any], seed: int | None, **params: Any) -> Any:
    from vllm import SamplingParams

    settings = {"temperature": 1.0, "max_tokens": TOKENS, "ignore_eos": True, "detokenize": False} | params
    return SamplingParams(seed=seed, extra_args={"nld": options}, **settings)


def texts(llm: Any, prompts: list[list[int]], params: list[Any]) -> list[list[int]]:
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = random_model(small_config(eos_token_id=11, block_size=8, max_position_embeddings=256), seed=5)
    return save(model, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def solo(folder: Path) -> dict[str, list[list[int]]]:
    """Every prompt's text in every mode, undisturbed. What must equal AR's runs at once, all else one at a time."""
    with engine(folder, spec=True, max_num_seqs=4, max_model_len=256) as llm:
        shun_ar(llm)
        found = {}
        for way, options in WAYS.items():
            params = [sampled(options, seed) for seed in range(len(PROMPTS))]
            if way == "AR" or way not in LOSSLESS:
                found[way] = [texts(llm, [ids], [own])[0] for ids, own in zip(PROMPTS, params, strict=True)]
            else:
                found[way] = texts(llm, PROMPTS, params)
        return found


@pytest.fixture(scope="module")
def cramped(folder: Path) -> Iterator[Any]:
    """A cache that holds two of the texts, and steps too small for the blocks of all."""
    settings = {"num_gpu_blocks_override": 10, "block_size": 32, "max_num_batched_tokens": 20, "max_num_seqs": 4}
    with engine(folder, spec=True, max_model_len=256, **settings) as llm:
        shun_ar(llm)
        yield llm


@pytest.mark.parametrize("way", LOSSLESS)
def test_seed_gives_the_text_of_ar(solo: dict[str, list[list[int]]], way: str) -> None:
    assert solo[way] == solo["AR"]
    assert len({tuple(text) for text in solo[way]}) == len(PROMPTS)


@pytest.mark.parametrize("way", WAYS)
def test_preemptions_and_cut_budgets_change_no_seeded_text(
    solo: dict[str, list[list[int]]], cramped: Any, way: str
) -> None:
    before, drafted = metric(cramped, "vllm:num_preemptions"), accepted(cramped)
    # Requests without a seed, and greedy ones, take turns with them.
    others = [sampled({}, None), sampled({}, None, temperature=0.0)]
    params = [sampled(WAYS[way], seed) for seed in range(len(PROMPTS))]
    found = texts(cramped, PROMPTS + PROMPTS[:2], params + others)
    assert metric(cramped, "vllm:num_preemptions") > before, "nothing was preempted: it would prove nothing"
    assert way == "AR" or accepted(cramped) > drafted
    assert found[: len(PROMPTS)] == solo[way]


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.7, "top_k": 5},
        {"top_p": 0.8},
        {"top_k": 7, "top_p": 0.9, "repetition_penalty": 1.2, "presence_penalty": 0.3},
        {"min_tokens": 30, "stop_token_ids": [7, 8], "ignore_eos": False},
        {"allowed_token_ids": [6, 7, 8, 9, 10, 12, 14], "bad_words": None},
    ],
    ids=lambda params: ",".join(params),
)
def test_seeded_text_equals_ar_under_every_sampling_parameter(cramped: Any, params: dict[str, Any]) -> None:
    ways = [{"mode": "ar"}, {}, {"mode": "auto"}]
    prompts, seeds = PROMPTS[:2] * len(ways), [3, 4] * len(ways)
    settings = [
        sampled(options, seed, **params) for options, seed in zip(sorted(ways * 2, key=str), seeds, strict=True)
    ]
    found = texts(cramped, prompts, settings)
    assert found[:2] == found[2:4] == found[4:]
