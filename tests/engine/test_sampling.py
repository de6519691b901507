"""Sampled output has AR's distribution: a chi-square against the exact probabilities of the dense reference."""

from __future__ import annotations

import copy
import itertools
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.chi_square import chi_square_p_value
from tests.support.engines import accepted, engine, generate, random_prompts, shun_ar
from tests.support.models import random_model, save, small_config
from vllm_nld.proposer.requests import Requests
from vllm_nld.proposer.thinking import ThinkingBudget
from vllm_nld.reference import ReferenceModel, ar_generate

REQUESTS, TOKENS = 1000, 3
"""As many tell a temperature of 1.2 from 1.0 with a p-value of 1e-6, for any seed that was tried."""


def second_and_third_token_probabilities(
    model: ReferenceModel, prompt: list[int], temperature: float = 1.0, top_k: int = 0
) -> torch.Tensor:
    """Exact AR probabilities of (token 2, token 3), float64 ``[vocab, vocab]``, summed over token 1.

    Verification of drafts decides these two; token 1 comes from the prefill.
    """

    def next_probabilities(ids: list[int]) -> torch.Tensor:
        return tempered(model.causal(torch.tensor([ids]))[0, -1].double().softmax(-1), temperature, top_k)

    vocab = model.config.vocab_size
    joint = torch.zeros(vocab, vocab, dtype=torch.float64)
    first = next_probabilities(prompt)
    for one in range(vocab):
        if first[one] > 0:
            second = next_probabilities([*prompt, one])
            for two in range(vocab):
                if second[two] > 0:
                    joint[two] += first[one] * second[two] * next_probabilities([*prompt, one, two])
    return joint


def tempered(probabilities: torch.Tensor, temperature: float, top_k: int) -> torch.Tensor:
    """The distribution that vLLM samples from."""
    powered = probabilities ** (1 / temperature)
    kept = powered >= powered.sort(descending=True).values[top_k - 1] if top_k else powered > 0
    return powered * kept / (powered * kept).sum()


WAYS: dict[str, dict[str, Any]] = {
    "AR": {"mode": "ar"},
    "most probable drafts": {"sampled_drafts": False},
    "drawn drafts": {},
    "drawn drafts, trimmed": {"mode": "auto"},
    "only looked-up drafts": {"mode": "auto", "prompt_lookup": 1},
}
SEEDED = {f"{way}, seeded": WAYS[way] for way in ("AR", "drawn drafts", "most probable drafts")}


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.7, 5)])
def test_every_draft_method_keeps_the_distribution_of_ar(
    temperature: float, top_k: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Auto mode decides by measured time. With a clock that ticks when read, every run draws the same."""
    from vllm import SamplingParams

    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks) * 1e-3)

    model = random_model(small_config(vocab_size=8, block_size=4, num_hidden_layers=1), seed=2)
    (start,) = random_prompts([9], 8, seed=1)
    prompt = ar_generate(model, start, 20).ids  # the model's own text, so that some looked-up drafts are accepted
    expected = REQUESTS * second_and_third_token_probabilities(model, prompt, temperature, top_k)
    greedy_ids = ar_generate(model, prompt, TOKENS).ids[len(prompt) :]
    p_values = {}
    with engine(save(model, tmp_path), spec=True, seed=11, max_num_seqs=64) as llm:
        shun_ar(llm)
        for way, options in (WAYS | SEEDED).items():
            shared: dict[str, Any] = {"max_tokens": TOKENS, "detokenize": False, "extra_args": {"nld": options}}
            greedy = SamplingParams(temperature=0.0, **shared)
            params = [
                greedy
                if i % 50 == 7
                else SamplingParams(temperature=temperature, top_k=top_k, seed=i if way in SEEDED else None, **shared)
                for i in range(REQUESTS + REQUESTS // 49)
            ]
            before = accepted(llm)
            outputs = llm.generate([{"prompt_token_ids": prompt}] * len(params), params, use_tqdm=False)
            if options != WAYS["AR"]:
                assert accepted(llm) - before > REQUESTS / 10, "hardly any draft was accepted: it would prove nothing"
            counts = torch.zeros(8, 8)
            for output, settings in zip(outputs, params, strict=True):
                ids = list(output.outputs[0].token_ids)
                if settings is greedy:
                    assert ids == greedy_ids
                else:
                    counts[ids[1], ids[2]] += 1
            p_values[way] = chi_square_p_value(counts, expected * counts.sum() / REQUESTS)
    assert all(p > 1e-3 for p in p_values.values()), p_values


@pytest.mark.parametrize("multiple", [False, True])
def test_thinking_budget_changes_no_distribution(
    multiple: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafts are cut where they open a thinking section. Its start is the most frequent token here."""
    from vllm import SamplingParams

    model = random_model(small_config(vocab_size=8, block_size=4, num_hidden_layers=1), seed=2)
    (start,) = random_prompts([9], 8, seed=1)
    prompt = ar_generate(model, start, 20).ids
    expected = second_and_third_token_probabilities(model, prompt)
    opens = divmod(int(expected.argmax()), 8) if multiple else (int(expected.sum(1).argmax()),)
    budget = ThinkingBudget(1000, list(opens), [7])
    monkeypatch.setattr(Requests, "_budget", lambda *_: copy.copy(budget))
    with engine(save(model, tmp_path), spec=True, seed=11, max_num_seqs=64) as llm:
        params = SamplingParams(temperature=1.0, max_tokens=TOKENS, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": prompt}] * REQUESTS, params, use_tqdm=False)
        assert accepted(llm) > REQUESTS / 10, "hardly any draft was accepted: it would prove nothing"
    counts = torch.zeros(8, 8)
    for output in outputs:
        _, two, three = output.outputs[0].token_ids
        counts[two, three] += 1
    assert chi_square_p_value(counts, expected * REQUESTS) > 1e-3


def test_chi_square_detects_a_wrong_distribution() -> None:
    """The statistic must reject a sampler that is off by a temperature of 1.2."""
    model = random_model(small_config(vocab_size=8, block_size=4, num_hidden_layers=1), seed=2)
    (prompt,) = random_prompts([9], 8, seed=1)
    expected = second_and_third_token_probabilities(model, prompt)
    wrong = expected ** (1 / 1.2)
    draws = torch.multinomial(
        (wrong / wrong.sum()).flatten(), REQUESTS, True, generator=torch.Generator().manual_seed(0)
    )
    counts = torch.bincount(draws, minlength=64).view(8, 8)
    assert chi_square_p_value(counts, expected * REQUESTS) < 1e-3


def test_top_k_without_top_p_in_a_step_without_drafts(tmp_path: Path) -> None:
    """A prefill has no drafts; vLLM 0.32's rejection sampler fails on it."""
    model = random_model(small_config(vocab_size=8, block_size=4, num_hidden_layers=1), seed=2)
    with engine(save(model, tmp_path), spec=True) as llm:
        for mode in ("ar", "self_speculation"):
            (ids,) = generate(llm, [[6, 7]], temperature=1.0, top_k=1, extra_args={"nld": {"mode": mode}})
            assert ids == ar_generate(model, [6, 7], 24).ids[2:]


def test_padding_of_a_cached_prompt_changes_no_distribution(tmp_path: Path) -> None:
    """vLLM pads a request with one token to compute with drafts of -1, next to the drawn drafts of others."""
    from vllm import SamplingParams

    model = random_model(small_config(vocab_size=8, block_size=4, num_hidden_layers=1), seed=2)
    (prompt,) = random_prompts([33], 8, seed=1)
    expected = model.causal(torch.tensor([prompt]))[0, -1].double().softmax(-1)
    settings: dict[str, Any] = {"enable_prefix_caching": True, "block_size": 32, "max_num_seqs": 8}
    settings["scheduler_cls"] = "vllm.v1.core.sched.scheduler.Scheduler"  # this extension's does not pad
    with engine(save(model, tmp_path), spec=True, seed=11, **settings) as llm:
        params = SamplingParams(temperature=1.0, max_tokens=6, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": prompt}] * 1000, params, use_tqdm=False)
    counts = torch.bincount(torch.tensor([output.outputs[0].token_ids[0] for output in outputs]), minlength=8)
    assert chi_square_p_value(counts, expected * 1000) > 1e-3


def test_constraints_without_any_allowed_token_do_not_end_the_engine(tmp_path: Path) -> None:
    model = random_model(small_config(vocab_size=8, block_size=4, num_hidden_layers=1), seed=2)
    with engine(save(model, tmp_path), spec=True) as llm:
        for constraints in (
            {"allowed_token_ids": [7], "stop_token_ids": [7], "min_tokens": 8},
            {"allowed_token_ids": [5]},
        ):
            generate(llm, [[6, 7]], temperature=1.0, max_tokens=12, **constraints)
        assert len(generate(llm, [[6, 7]], max_tokens=4)[0]) == 4


@pytest.mark.parametrize("mode", ["ar", "self_speculation", "diffusion"])
def test_seeded_request_with_one_token_to_compute_ignores_other_requests(mode: str, tmp_path: Path) -> None:
    """vLLM pads it if others decode when it arrives."""
    from vllm import SamplingParams

    model = random_model(small_config(vocab_size=8, block_size=4, num_hidden_layers=1), seed=2)
    seeded = SamplingParams(temperature=1.0, seed=3, max_tokens=20, extra_args={"nld": {"mode": mode}})
    texts: list[list[int]] = []
    with engine(save(model, tmp_path), spec=True) as llm:
        core = llm.llm_engine
        for company in (0, 2):
            for name in range(company):
                core.add_request(
                    f"{name}", {"prompt_token_ids": [6, 7, 6]}, SamplingParams(temperature=0, max_tokens=90)
                )
            for _ in range(3 if company else 0):
                core.step()
            core.add_request("seeded", {"prompt_token_ids": [7]}, seeded)
            while core.has_unfinished_requests():
                texts += [
                    list(output.outputs[0].token_ids)
                    for output in core.step()
                    if output.finished and output.request_id.startswith("seeded")
                ]
    assert len(texts) == 2
    assert texts[0] == texts[1]
