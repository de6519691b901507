"""Block diffusion in vLLM equals the reference, token for token and forward for forward, in float32."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.support import extremes
from tests.support.engines import engine, generate, metric, random_prompts, runner, watch_blocks
from tests.support.models import random_model, save, small_config
from vllm_nld.reference import ReferenceModel, ar_generate
from vllm_nld.reference import generate as reference_generate
from vllm_nld.serving.ledger import Tally

LENGTHS = [1, 40, 90, 170, 3, 64, 17, 130]


@pytest.fixture(scope="module")
def model() -> ReferenceModel:
    return random_model(small_config(eos_token_id=11, block_size=16), seed=3)


@pytest.fixture(scope="module")
def folder(model: ReferenceModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(model, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> Any:
    with engine(folder, spec=True, max_num_seqs=8) as made:
        yield made


def watch_tallies(llm: Any) -> dict[tuple[int, ...], Tally]:
    """Collect the counts of each request, by its prompt, as requests end."""
    tallies: dict[tuple[int, ...], Tally] = {}
    requests = runner(llm).drafter._requests
    if not hasattr(requests, "original"):
        requests.original = requests.finish

    def finish(request_id: str) -> Any:
        state = requests.original(request_id)
        if state is not None:
            tallies[tuple(state.cached.prompt_token_ids)] = state.tally
        return state

    requests.finish = finish
    return tallies


def run(llm: Any, prompts: list[list[int]], budget: int, **nld: Any) -> tuple[list[list[int]], list[int]]:
    """Return texts and, per request, denoising forwards + commits."""
    return run_each(llm, prompts, [budget] * len(prompts), **nld)


def run_each(llm: Any, prompts: list[list[int]], budgets: list[int], **nld: Any) -> tuple[list[list[int]], list[int]]:
    """As :func:`run`, each prompt with its own budget."""
    from vllm import SamplingParams

    tallies = watch_tallies(llm)
    shared: dict[str, Any] = {
        "temperature": 0,
        "detokenize": False,
        "extra_args": {"nld": {"mode": "diffusion", **nld}},
    }
    params = [SamplingParams(max_tokens=budget, **shared) for budget in budgets]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    texts = [list(output.outputs[0].token_ids) for output in outputs]
    generate(llm, [[1, 2]], max_tokens=1)  # vLLM reports finished requests to the worker with the next step
    return texts, [tallies[tuple(p)].forwards["denoise"] + tallies[tuple(p)].forwards["commit"] for p in prompts]


POLICIES: list[dict[str, Any]] = [
    {"threshold": 0.9},
    {"threshold": 0.3},
    {"threshold": 0.0},
    {"threshold": 1.0, "max_denoising_steps": 3},
    {"threshold": 0.3, "block_length": 4},
    {"threshold": 0.25, "block_length": 7, "max_denoising_steps": 1},
    {"sampler": "top_k", "tokens_per_step": 3},
    {"sampler": "top_k", "max_denoising_steps": 4},
    {"sampler": "top_k"},
    {"sampler": "left_to_right", "tokens_per_step": 2},
    {"sampler": "left_to_right", "max_denoising_steps": 5, "block_length": 9},
    {"sampler": "entropy_budget", "entropy_budget": 1.5},
    {"sampler": "entropy_budget", "entropy_budget": 0.0},
    {"threshold": 0.3, "seed_first": False},
    {"sampler": "top_k", "tokens_per_step": 4, "seed_first": False, "block_length": 8},
]


def test_random_options_do_not_end_the_engine(llm: Any, model: ReferenceModel) -> None:
    """Random options with extreme values of ours and vLLM's are refused when they are added, or served to the end."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    rng, answers = random.Random(7), {"refused": 0, "served": 0}
    core = llm.llm_engine
    for number in range(300):
        tokens = rng.choice([1, 8, 20])
        settings = {
            "temperature": rng.choice([0.0, 0.0, 1e-40, 1.0, 2.0]),
            "top_k": rng.choice([0, 3, 2**31 - 1]),
            "top_p": rng.choice([1.0, 0.9, 5e-324]),
            "repetition_penalty": rng.choice([1.0, 1.0, 1e-300, 1e-40, 1e308]),
            "presence_penalty": rng.choice([0.0, 0.0, -2.0, 2.0]),
            "frequency_penalty": rng.choice([0.0, 0.0, -2.0, 5e-324]),
            "stop_token_ids": rng.choice([[], [7], [5]]),  # 5 is the mask token
            "allowed_token_ids": rng.choice([None, None, [7], [5], [6, 9]]),
            "seed": rng.choice([None, 0, 2**63 - 1]),
        }
        prompt, nld = {"prompt_token_ids": random_prompts([9], 24, number)[0]}, extremes.options(rng)
        limits = {"max_tokens": tokens, "min_tokens": rng.choice([0, 0, min(8, tokens)])}
        try:
            params = SamplingParams(detokenize=False, extra_args={"nld": nld}, **limits, **settings)
            core.add_request(str(number), prompt, params)
            answers["served"] += 1
        except VLLMValidationError:
            answers["refused"] += 1
        core.step()
    while core.has_unfinished_requests():
        core.step()
    assert min(answers.values()) > 50, answers
    prompts = random_prompts(LENGTHS, 24)
    expected = [ar_generate(model, ids, 24).ids[len(ids) :] for ids in prompts]
    assert generate(llm, prompts, [{"mode": "self_speculation"}] * len(prompts)) == expected


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: ",".join(f"{k}={v}" for k, v in policy.items()))
def test_tokens_and_forwards_equal_the_reference(llm: Any, model: ReferenceModel, policy: dict[str, Any]) -> None:
    """Eight requests at once, each at its own denoising depth; a budget of 33 leaves a last block of one token."""
    prompts, budgets = random_prompts(LENGTHS, 24, seed=7), [50, 33] * 4
    expected = [reference_generate(model, ids, budget, **policy) for ids, budget in zip(prompts, budgets, strict=True)]
    texts, nfe = run_each(llm, prompts, budgets, **policy)
    assert texts == [g.ids[len(ids) :] for g, ids in zip(expected, prompts, strict=True)]
    assert nfe == [g.nfe for g in expected]


def test_single_request_equals_its_result_in_a_batch(llm: Any, model: ReferenceModel) -> None:
    for ids in random_prompts(LENGTHS, 24, seed=7)[:4]:
        expected = reference_generate(model, ids, 50, threshold=0.3)
        assert run(llm, [ids], 50, threshold=0.3) == ([expected.ids[len(ids) :]], [expected.nfe])


def test_stop_token_ends_block_early(llm: Any, model: ReferenceModel) -> None:
    """Some block must end with masks after its stop token, or the test shows nothing."""
    prompts = random_prompts(LENGTHS, 24, seed=11)
    unfinished: list[bool] = []
    watch_blocks(llm, lambda block: unfinished.append(5 in block.tokens))
    for stop in (7, 9, 13, 17, 21):
        expected = [reference_generate(model, ids, 48, threshold=0.2, eos_token_id=stop) for ids in prompts]
        tallies = watch_tallies(llm)
        nld = {"nld": {"mode": "diffusion", "threshold": 0.2}}
        texts = generate(llm, prompts, max_tokens=48, stop_token_ids=[stop], ignore_eos=True, extra_args=nld)
        generate(llm, [[1, 2]], max_tokens=1)
        assert texts == [g.ids[len(ids) :] for g, ids in zip(expected, prompts, strict=True)]
        nfe = [tallies[tuple(ids)].forwards["denoise"] + tallies[tuple(ids)].forwards["commit"] for ids in prompts]
        assert nfe == [g.nfe for g in expected]
    assert any(unfinished)


def test_ignore_eos_continues_after_eos(llm: Any, model: ReferenceModel) -> None:
    prompts = random_prompts(LENGTHS, 24, seed=11)
    texts = generate(llm, prompts, max_tokens=48, ignore_eos=True, extra_args={"nld": {"mode": "diffusion"}})
    assert texts == [
        reference_generate(model, ids, 48, threshold=0.9, eos_token_id=-1).ids[len(ids) :] for ids in prompts
    ]


def test_finished_blocks_leave_the_pass(llm: Any) -> None:
    """The forwards shrink to the blocks that still need one, also if the step waits for all of them."""
    prompts = random_prompts(LENGTHS, 24, seed=7)
    drafter = runner(llm).drafter
    draft_pass, drafter.parks = drafter.draft_pass, False
    spent = {}
    for compact in (True, False):
        draft_pass.compact = compact
        before = (draft_pass.forwards, draft_pass.block_forwards)
        texts, _ = run(llm, prompts, 50, threshold=0.3)
        spent[compact] = (texts, draft_pass.forwards - before[0], draft_pass.block_forwards - before[1])
    draft_pass.compact = drafter.parks = True
    assert spent[True][:2] == spent[False][:2]
    assert spent[True][2] < 0.8 * spent[False][2]


def test_modes_mix_in_one_batch(llm: Any, model: ReferenceModel) -> None:
    prompts = random_prompts(LENGTHS, 24, seed=7)
    modes = ["ar", "diffusion", "self_speculation", "auto"] * 2
    texts = generate(llm, prompts, each=[{"mode": mode} for mode in modes], max_tokens=40)
    for mode, ids, text in zip(modes, prompts, texts, strict=True):
        if mode == "diffusion":
            expected = reference_generate(model, ids, 40, threshold=0.9)
        else:
            expected = ar_generate(model, ids, 40)
        assert text == expected.ids[len(ids) :], mode


def test_preemption_does_not_change_the_text(folder: Path, model: ReferenceModel) -> None:
    """The cache is too small for all requests: blocks are interrupted half way, and continue where they were."""
    prompts = random_prompts([60, 61, 62, 63], 24, seed=21)
    expected = [reference_generate(model, ids, 120, threshold=0.3, eos_token_id=-1) for ids in prompts]
    pages = 14
    page_bytes = 2 * 2 * 2 * 32 * 4 * 32  # layers, keys and values, heads, head size, float32, tokens
    with engine(folder, spec=True, block_size=32, kv_cache_memory_bytes=pages * page_bytes, max_model_len=224) as llm:
        nld = {"mode": "diffusion", "threshold": 0.3}
        texts = generate(llm, prompts, max_tokens=120, ignore_eos=True, extra_args={"nld": nld})
        assert metric(llm, "vllm:num_preemptions") > 0
    assert texts == [g.ids[len(ids) :] for g, ids in zip(expected, prompts, strict=True)]


def test_short_token_budget_cuts_blocks_but_not_texts(folder: Path, model: ReferenceModel) -> None:
    """The scheduler drops drafts that a step has no room for; the rest of the block is committed by the next.

    At threshold 0 every block takes one forward, so that all of them are ready for the same step.
    """
    prompts = random_prompts([20, 21, 22, 23], 24, seed=22)
    expected = [reference_generate(model, ids, 60, threshold=0.0) for ids in prompts]
    with engine(folder, spec=True, max_num_batched_tokens=40, max_num_seqs=4, max_model_len=200) as llm:
        cut: list[int] = []
        drafter = runner(llm).drafter
        original = drafter.begin_step

        def begin_step(output: Any) -> None:
            cut.extend(len(ids) for ids in output.scheduled_spec_decode_tokens.values())
            original(output)

        drafter.begin_step = begin_step
        texts, _ = run(llm, prompts, 60, threshold=0.0)
    assert texts == [g.ids[len(ids) :] for g, ids in zip(expected, prompts, strict=True)]
    assert any(0 < count < 15 for count in cut[:-4])


@pytest.mark.parametrize("pads", [False, True])
def test_prompt_cached_except_its_last_token(folder: Path, model: ReferenceModel, pads: bool) -> None:
    """vLLM's scheduler pads such a request with drafts of -1 if others already decode; ours does not."""
    from vllm import SamplingParams

    prompt, other = random_prompts([65, 20], 24, seed=5)

    def params(mode: str, budget: int, **nld: Any) -> SamplingParams:
        return SamplingParams(
            temperature=0, max_tokens=budget, detokenize=False, extra_args={"nld": {"mode": mode, **nld}}
        )

    settings = {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"} if pads else {}
    with engine(folder, spec=True, enable_prefix_caching=True, block_size=32, max_num_seqs=4, **settings) as llm:
        padded: list[bool] = []
        steps = llm.llm_engine
        scheduler = steps.engine_core.engine_core.scheduler
        original = scheduler.schedule

        def schedule(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            padded.extend(-1 in ids for ids in output.scheduled_spec_decode_tokens.values())
            return output

        scheduler.schedule = schedule
        for turn in ("first", "again"):
            steps.add_request(f"{turn} other", {"prompt_token_ids": other}, params("ar", 60))
            steps.step()
            steps.add_request(turn, {"prompt_token_ids": prompt}, params("diffusion", 40, threshold=0.3))
            texts = {}
            while steps.has_unfinished_requests():
                texts.update({output.request_id: list(output.outputs[0].token_ids) for output in steps.step()})
            assert texts[turn] == reference_generate(model, prompt, 40, threshold=0.3).ids[len(prompt) :]
        assert any(padded) == pads
        assert metric(llm, "vllm:prefix_cache_hits") == 64
