"""All modes in one batch on the second runner; diffusion is the reference's, by every selection policy."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.engines import generate, random_prompts
from tests.support.models import random_model, save, small_config
from tests.support.second_runner import second_engine
from vllm_nld.reference import ReferenceModel, ar_generate
from vllm_nld.reference.diffusion import generate as diffuse

VOCAB = 24
POLICIES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"sampler": "confidence_threshold", "threshold": 0.4}, {"sampler": "confidence_threshold", "threshold": 0.4}),
    ({"sampler": "top_k", "tokens_per_step": 2}, {"sampler": "top_k", "tokens_per_step": 2}),
    ({"sampler": "left_to_right", "tokens_per_step": 3}, {"sampler": "left_to_right", "tokens_per_step": 3}),
    ({"sampler": "entropy_budget", "entropy_budget": 0.7}, {"sampler": "entropy_budget", "entropy_budget": 0.7}),
    ({"block_length": 5, "max_denoising_steps": 2}, {"sampler": "confidence_threshold", "block_length": 5,
                                                     "threshold": 0.9, "max_denoising_steps": 2}),
]  # fmt: skip
"""A request's options, and the reference's arguments for them."""


@pytest.fixture(scope="module")
def model() -> ReferenceModel:
    return random_model(small_config(), 3)


@pytest.fixture(scope="module")
def folder(model: ReferenceModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(model, tmp_path_factory.mktemp("mixed"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[Any]:
    with second_engine(folder, max_num_seqs=7) as llm:
        yield llm


def test_every_policy_next_to_the_other_modes(llm: Any, model: ReferenceModel) -> None:
    own = [({"mode": "diffusion"} | options, reference) for options, reference in POLICIES]
    prompts = random_prompts([9 + 3 * index for index in range(len(own) + 2)], VOCAB, seed=6)
    expected = [
        diffuse(model, prompt, 17, **reference).ids[len(prompt) :]
        for prompt, (_, reference) in zip(prompts, own, strict=False)
    ]
    expected += [ar_generate(model, prompt, 17).ids[len(prompt) :] for prompt in prompts[len(own) :]]
    each = [options for options, _ in own] + [{}, {"mode": "ar"}]
    before = llm.collective_rpc("nld_tally")[0]
    assert generate(llm, prompts, each, max_tokens=17) == expected
    after = llm.collective_rpc("nld_tally")[0]
    assert after["tokens"]["diffusion"] - before["tokens"].get("diffusion", 0) >= 17 * len(own)
    assert after["forwards"]["denoise"] > before["forwards"].get("denoise", 0)


def test_a_block_is_committed_in_several_steps(folder: Path, model: ReferenceModel) -> None:
    """A step of ten tokens holds no three blocks of eight."""
    prompts = random_prompts([4, 5, 6], VOCAB, seed=9)
    modes: list[dict[str, Any]] = [
        {"mode": "diffusion", "threshold": 0.4}, {"mode": "diffusion", "sampler": "top_k", "tokens_per_step": 2}, {}
    ]  # fmt: skip
    expected = [
        diffuse(model, prompts[0], 20, sampler="confidence_threshold", threshold=0.4).ids[4:],
        diffuse(model, prompts[1], 20, sampler="top_k", tokens_per_step=2).ids[5:],
        ar_generate(model, prompts[2], 20).ids[6:],
    ]
    with second_engine(folder, max_num_batched_tokens=10, max_num_seqs=3) as llm:
        assert generate(llm, prompts, modes, max_tokens=20) == expected


def test_random_stress(folder: Path, model: ReferenceModel) -> None:
    """Modes, lengths, arrivals and aborts at random, in a cache with room for two and a half texts."""
    from vllm import SamplingParams

    rng = random.Random(5)
    prompts = random_prompts([rng.randint(1, 60) for _ in range(12)], VOCAB, seed=5)
    settings = {"max_num_batched_tokens": 32, "enable_prefix_caching": True, "block_size": 32}
    with second_engine(folder, num_gpu_blocks_override=6, **settings) as llm:
        engine, asked, found, aborted = llm.llm_engine, {}, {}, set()
        waiting = list(range(len(prompts)))
        while waiting or engine.has_unfinished_requests():
            while waiting and rng.random() < 0.4:
                index = waiting.pop()
                own = rng.choice([{"mode": "ar"}, {}, {"block_length": rng.randint(2, 8)}])
                asked[str(index)] = index, rng.randint(1, 20)
                params = SamplingParams(
                    temperature=0, max_tokens=asked[str(index)][1], detokenize=False, extra_args={"nld": own}
                )
                engine.add_request(str(index), {"prompt_token_ids": prompts[index]}, params)
            for output in engine.step():
                if output.finished:
                    found[output.request_id] = list(output.outputs[0].token_ids)
            if rng.random() < 0.05 and asked:
                name = rng.choice(sorted(asked))
                aborted.add(name)
                engine.abort_request([name])
    for name, text in found.items():
        index, tokens = asked[name]
        expected = ar_generate(model, prompts[index], tokens).ids[len(prompts[index]) :]
        assert text == expected[: len(text)] and (len(text) == tokens or name in aborted)
    assert len(found) >= len(prompts) - len(aborted)
