"""All modes in one batch on the second runner; diffusion is the reference's, by every selection policy."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.engines import counters, generate, metric, random_prompts
from tests.support.models import random_model, save, small_config
from tests.support.second_runner import second_engine
from vllm_nld.draft_pass.learned_sampler import LearnedSampler, LearnedSamplerConfig
from vllm_nld.reference import ReferenceModel, ar_generate
from vllm_nld.reference.diffusion import generate as diffuse
from vllm_nld.serving.admission import LEARNED_SAMPLER_FOLDER

VOCAB = 24
POLICIES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"sampler": "confidence_threshold", "threshold": 0.4}, {"sampler": "confidence_threshold", "threshold": 0.4}),
    ({"sampler": "top_k", "tokens_per_step": 2}, {"sampler": "top_k", "tokens_per_step": 2}),
    ({"sampler": "left_to_right", "tokens_per_step": 3}, {"sampler": "left_to_right", "tokens_per_step": 3}),
    ({"sampler": "entropy_budget", "entropy_budget": 0.7}, {"sampler": "entropy_budget", "entropy_budget": 0.7}),
    ({"block_length": 5, "max_denoising_steps": 2}, {"sampler": "confidence_threshold", "block_length": 5,
                                                     "threshold": 0.9, "max_denoising_steps": 2}),
    ({"sampler": "learned", "threshold": 0.6}, {"sampler": "learned", "threshold": 0.6}),
]  # fmt: skip
"""A request's options, and the reference's arguments for them."""


@pytest.fixture(scope="module")
def model() -> ReferenceModel:
    return random_model(small_config(), 3)


@pytest.fixture(scope="module")
def folder(model: ReferenceModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a learned sampler of random weights, which judges otherwise than the model itself."""
    folder = save(model, tmp_path_factory.mktemp("mixed"))
    torch.manual_seed(2)
    sizes = {"token_dims": 8, "d_model": 16, "layers": 1, "heads": 2, "feed_forward": 16}
    sampler = LearnedSampler(LearnedSamplerConfig(vocab_size=VOCAB, **sizes))
    with torch.no_grad():
        sampler.token_features.normal_()
        sampler.head.weight.normal_()
    sampler.save(folder / LEARNED_SAMPLER_FOLDER)
    return folder


@pytest.fixture(scope="module")
def learned(folder: Path) -> LearnedSampler:
    return LearnedSampler.load(folder / LEARNED_SAMPLER_FOLDER)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[Any]:
    with second_engine(folder, max_num_seqs=8) as llm:
        yield llm


def test_every_policy_next_to_the_other_modes(llm: Any, model: ReferenceModel, learned: LearnedSampler) -> None:
    own = [({"mode": "diffusion"} | options, reference) for options, reference in POLICIES]
    prompts = random_prompts([9 + 3 * index for index in range(len(own) + 2)], VOCAB, seed=6)
    expected = [
        diffuse(model, prompt, 17, learned=learned, **reference).ids[len(prompt) :]
        for prompt, (_, reference) in zip(prompts, own, strict=False)
    ]
    by_itself = diffuse(model, prompts[len(own) - 1], 17, sampler="confidence_threshold", threshold=0.6)
    assert by_itself.ids[-17:] != expected[-1], "the learned sampler's choices make a difference"
    expected += [ar_generate(model, prompt, 17).ids[len(prompt) :] for prompt in prompts[len(own) :]]
    each = [options for options, _ in own] + [{}, {"mode": "ar"}]
    before = llm.collective_rpc("nld_tally")[0]
    assert generate(llm, prompts, each, max_tokens=17) == expected
    after = llm.collective_rpc("nld_tally")[0]
    assert after["tokens"]["diffusion"] - before["tokens"].get("diffusion", 0) >= 17 * len(own)
    assert after["forwards"]["denoise"] > before["forwards"].get("denoise", 0)


def test_reports_say_how_tokens_came(llm: Any, model: ReferenceModel) -> None:
    """Its scheduler makes them; a diffusion request's first block is told apart token by token."""
    from vllm import SamplingParams

    modes = ("ar", "self_speculation", "diffusion")
    prompts = random_prompts([9, 12, 15], VOCAB, seed=8)
    params = [
        SamplingParams(
            temperature=0, max_tokens=17, detokenize=False, extra_args={"nld": {"mode": mode, "report": True}}
        )
        for mode in modes
    ]
    before = llm.collective_rpc("nld_tally")[0]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    reports = dict(zip(modes, (output.kv_transfer_params["nld"] for output in outputs), strict=True))
    origins = {mode: report["origins"][:17] for mode, report in reports.items()}
    assert origins["ar"] == "a" * 17
    assert set(origins["self_speculation"]) <= set("advb")
    report = reports["self_speculation"]
    assert report["origins"].count("d") == report["accepted_drafts"]
    assert report["forwards"]["verify"] == report["verified_blocks"] > 0
    expected = diffuse(model, prompts[2], 17)
    block = llm.llm_engine.vllm_config.speculative_config.num_speculative_tokens + 1
    assert origins["diffusion"] == "".join("s" if place % block == 0 else "n" for place in range(17))
    assert list(outputs[2].outputs[0].token_ids) == expected.ids[-17:]
    after = llm.collective_rpc("nld_tally")[0]
    accepted = {name: after["accepted"].get(name, 0) - before["accepted"].get(name, 0) for name in after["accepted"]}
    assert accepted.get("self_speculation", 0) <= report["accepted_drafts"]


def test_nothing_is_denoised_after_a_stop_token(
    llm: Any, model: ReferenceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although the scheduler learns of it one step later."""
    (prompt,) = random_prompts([9], VOCAB, seed=5)
    text = diffuse(model, prompt, 17, threshold=0.4).ids[9:]
    stop = text[11]  # in the second block
    assert stop not in text[:11]
    forwards = list[int]()
    original = model.bidirectional
    monkeypatch.setattr(model, "bidirectional", lambda *args: forwards.append(1) or original(*args))
    expected = diffuse(model, prompt, 17, threshold=0.4, eos_token_id=stop).ids[9:]
    assert expected == text[:12]
    before = counters(llm)["draft_forwards"]
    options: dict[str, Any] = {"mode": "diffusion", "threshold": 0.4}
    assert generate(llm, [prompt], [options], max_tokens=17, stop_token_ids=[stop]) == [expected]
    assert counters(llm)["draft_forwards"] - before == len(forwards)


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


def test_a_step_without_room_for_drafts_commits_a_token(folder: Path, model: ReferenceModel) -> None:
    """Steps of four tokens, for four requests: vLLM runs its plain sampler then."""
    prompts = random_prompts([4, 5, 6, 7], VOCAB, seed=9)
    expected = [
        diffuse(model, ids, 10, sampler="confidence_threshold", block_length=4, threshold=0.4).ids[len(ids) :]
        for ids in prompts
    ]
    assert all(text != ar_generate(model, ids, 10).ids[-10:] for ids, text in zip(prompts, expected, strict=True))
    with second_engine(folder, spec=3, max_num_batched_tokens=4, max_num_seqs=4) as llm:
        assert generate(llm, prompts, [{"mode": "diffusion", "threshold": 0.4}] * 4, max_tokens=10) == expected


def test_a_request_takes_nothing_over_from_an_aborted_one(folder: Path, model: ReferenceModel) -> None:
    """In vLLM's tables it gets the place of one that was about to commit a block, next to one that drafts."""
    from vllm import SamplingParams

    diffusing = {"mode": "diffusion", "threshold": 0.4}
    prompts = dict(zip("abc", random_prompts([6, 7, 8], VOCAB, seed=10), strict=True))
    found = dict[str, list[int]]()
    with second_engine(folder, max_num_seqs=2) as llm:
        engine = llm.llm_engine
        for name, nld, tokens in (("a", {}, 16), ("b", diffusing, 30), ("c", diffusing, 5)):
            params = SamplingParams(temperature=0, max_tokens=tokens, detokenize=False, extra_args={"nld": nld})
            engine.add_request(name, {"prompt_token_ids": prompts[name]}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                found[output.request_id] = list(output.outputs[0].token_ids)
            if len(found.get("b", ())) > 1:
                engine.abort_request(["b"])
    assert found["a"] == ar_generate(model, prompts["a"], 16).ids[6:]
    assert found["c"] == diffuse(model, prompts["c"], 5, threshold=0.4).ids[8:]


class Fickle:
    """Trials that change their mind at random."""

    def __init__(self, rng: random.Random) -> None:
        self._rng, self.said = rng, set[bool]()

    def drafts(self, requests: int) -> bool:
        self.said.add(found := self._rng.random() < 0.6)
        return found

    def saw(self, *step: Any, comparable: bool) -> None:
        pass


def cut_blocks(model: ReferenceModel, prompt: list[int], text: list[int], tokens: int) -> int | None:
    """Return how many blocks of a diffusion text were cut short, at least; None if it is no such text.

    A preempted request drops what is left of its block, and starts another one after what it has committed.
    """
    fewest = {0: 0}
    for place in range(len(text)):
        if place not in fewest:
            continue
        block = diffuse(model, prompt + text[:place], min(8, tokens - place), threshold=0.4).ids[len(prompt) + place :]
        same = next((n for n, token in enumerate(block) if text[place + n : place + n + 1] != [token]), len(block))
        for count in range(1, same + 1):
            cuts = fewest[place] + (count < len(block))
            fewest[place + count] = min(cuts, fewest.get(place + count, cuts))
    return fewest.get(len(text))


SEEDED = {"temperature": 0.8, "seed": 11}
KINDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"mode": "ar"}, {}),
    ({}, {}),
    ({"block_length": 3}, {}),
    ({"mode": "auto"}, {}),
    ({"mode": "diffusion", "threshold": 0.4}, {}),
    ({}, SEEDED),
    ({"mode": "auto"}, SEEDED),
]


def test_random_stress(folder: Path, model: ReferenceModel) -> None:
    """All modes, lengths, arrivals and aborts at random, in a cache with room for two and a half texts.

    As soon as a request has diffused a little, all requests are preempted, and go on in the same step.
    """
    from vllm import SamplingParams

    rng = random.Random(5)
    kinds = KINDS * 2
    asked = {str(index): (rng.randint(1, 60), rng.randint(6, 16), kind) for index, kind in enumerate(kinds)}
    prompts = dict(zip(asked, random_prompts([length for length, *_ in asked.values()], VOCAB, seed=5), strict=True))
    settings = {"max_num_batched_tokens": 32, "enable_prefix_caching": True, "block_size": 32}
    with second_engine(folder, num_gpu_blocks_override=6, **settings) as llm:
        engine, found, aborted = llm.llm_engine, {}, set()
        expected = {
            name: generate(llm, [prompts[name]], [{"mode": "ar"}], max_tokens=tokens, **SEEDED)[0]
            for name, (_, tokens, kind) in asked.items()
            if kind[1]
        }
        scheduler = engine.engine_core.engine_core.scheduler
        scheduler.trials = trials = Fickle(rng)
        diffusing = {name for name, (*_, (nld, _)) in asked.items() if nld.get("mode") == "diffusion"}
        waiting = sorted(asked, key=lambda _: rng.random())
        arrived = []
        while waiting or engine.has_unfinished_requests():
            while waiting and rng.random() < 0.4:
                arrived.append(name := waiting.pop())
                _, tokens, (nld, own) = asked[name]
                params = SamplingParams(
                    **({"temperature": 0} | own), max_tokens=tokens, detokenize=False, extra_args={"nld": nld}
                )
                engine.add_request(name, {"prompt_token_ids": prompts[name]}, params)
            for output in engine.step():
                if output.finished:
                    found[output.request_id] = list(output.outputs[0].token_ids)
            if rng.random() < 0.05 and arrived:
                aborted.add(name := rng.choice(arrived))
                engine.abort_request([name])
            names = {request.request_id.split("-")[0] for request in scheduler.running if request.num_output_tokens > 2}
            if names & diffusing:
                diffusing -= names
                assert engine.reset_prefix_cache(reset_running_requests=True)
        preemptions = metric(llm, "vllm:num_preemptions")
    cut = 0
    for name, text in found.items():
        _, tokens, (nld, own) = asked[name]
        if nld.get("mode") == "diffusion":
            cuts = cut_blocks(model, prompts[name], text, tokens)
            assert cuts is not None, (name, text)
            cut += cuts
        else:
            whole = expected.get(name) or ar_generate(model, prompts[name], tokens).ids[len(prompts[name]) :]
            assert text == whole[: len(text)], (name, asked[name])
        assert len(text) == tokens or name in aborted
    assert len(found) >= len(prompts) - len(aborted) > 9
    assert trials.said == {True, False}
    assert preemptions > 3
    assert 0 < cut <= preemptions
