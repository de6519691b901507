"""Normal life of an engine: caches, chunks, preemption, aborts, limits. Every output equals the request's solo AR."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.engines import (
    accepted,
    counters,
    engine,
    generate,
    metric,
    random_prompts,
    replace_drafts,
    runner,
    watch_blocks,
)
from tests.support.models import random_model, save, small_config
from vllm_nld.draft_pass import memory
from vllm_nld.draft_pass.memory import profiling_drafts
from vllm_nld.reference import ReferenceModel, ar_generate


@pytest.fixture(scope="module")
def model() -> ReferenceModel:
    return random_model(small_config(eos_token_id=11, block_size=8, max_position_embeddings=256), seed=5)


@pytest.fixture(scope="module")
def folder(model: ReferenceModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(model, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[Any]:
    """An engine for all tests that need nothing but self-speculation. They come first: when another engine of the
    process ends, this one's process groups do, too.
    """
    with engine(folder, spec=True) as made:
        yield made


@pytest.fixture
def llm(shared: Any) -> Iterator[Any]:
    """The shared engine; whatever a test puts in the place of its draft pass is taken out again."""
    draft_pass = runner(shared).drafter.draft_pass
    original = draft_pass.run
    yield shared
    draft_pass.run = original


def solo(model: ReferenceModel, prompts: list[list[int]], budget: int, **settings: Any) -> list[list[int]]:
    return [ar_generate(model, ids, budget, **settings).ids[len(ids) :] for ids in prompts]


def test_draft_pass_leaves_cache_bit_identical(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also checks, on the same engine, its profiling run, and how drafts share the memory for probabilities."""
    draft_pass = runner(llm).drafter.draft_pass
    original, passes = draft_pass.run, []

    def compare(blocks: Any, leave: Any) -> None:
        before = [layer.kv_cache.clone() for layer in draft_pass.layers.values()]
        original(blocks, leave)
        after = [layer.kv_cache for layer in draft_pass.layers.values()]
        passes.append(all(torch.equal(x, y) for x, y in zip(before, after, strict=True)))
        assert any(x.any() for x in before), "nothing was cached, so nothing was compared"

    draft_pass.run = compare
    generate(llm, random_prompts([3, 70, 140], 24))
    assert len(passes) > 5
    assert all(passes)
    draft_pass.run = original
    check_profiling(runner(llm), monkeypatch)
    monkeypatch.setattr(memory, "DRAWN_BYTES", 6 * 4 * 24)
    assert max(drafts_per_step(llm, temperature=1.0)) <= 6
    assert max(drafts_per_step(llm, temperature=0.0)) == 21


def drafts_per_step(llm: Any, temperature: float) -> list[int]:
    """The numbers of drafts in the steps of three requests."""
    draft_pass = runner(llm).drafter.draft_pass
    original, drafts = draft_pass.run, []

    def count(blocks: Any, leave: Any) -> None:
        drafts.append(sum(block.length - 1 for block in blocks))
        original(blocks, leave)

    draft_pass.run = count
    generate(llm, random_prompts([3, 70, 140], 24), temperature=temperature, max_tokens=30, ignore_eos=True)
    draft_pass.run = original
    assert any(drafts)
    return drafts


def check_profiling(of: Any, patch: pytest.MonkeyPatch) -> None:
    """vLLM's profiling run drafts and verifies the most that there can be; so do drafts while there is no cache."""
    counted = of.drafter.draft_pass.forwards
    caches = {layer: layer.kv_cache for layer in of.drafter.draft_pass.layers.values()}
    for layer in caches:
        layer.kv_cache = torch.tensor([])
    of.drafter.profile()
    for layer, cache in caches.items():
        layer.kv_cache = cache
    verify, verified = of.rejection_sampler.forward, []
    counting = lambda *args: (verified.append(args[2].shape), verify(*args))[1]  # noqa: E731
    with patch.context() as only_here:
        only_here.setattr(of.rejection_sampler, "forward", counting)
        with profiling_drafts(of, 7):
            of.profile_run()
    requests = of.scheduler_config.max_num_seqs
    assert set(verified) == {(requests * 8, 24)}
    assert of.drafter.draft_pass.forwards == counted
    # Inputs of the compiled model in causal passes, and so in draft passes.
    assert (of.input_ids.gpu.dtype, of.positions.dtype) == (torch.int32, torch.int64)


def test_stop_token_right_after_min_tokens(model: ReferenceModel, llm: Any) -> None:
    """Perfect drafts that cross ``min_tokens`` in a block whose bonus token is a stop token, which AR would obey."""
    bonus = 8  # output index: the prefill yields 0, seven accepted drafts 1 to 7
    tried = random_prompts([20] * 40, 24, seed=3)
    texts = ((ids, solo(model, [ids], 24, eos_token_id=-1)[0]) for ids in tried)
    prompt, text = next((p, t) for p, t in texts if t[bonus] not in t[:bonus])

    def oracle_drafts(block: Any) -> list[int]:
        return (prompt + text)[block.prefix + 1 : block.prefix + block.length]

    replace_drafts(llm, oracle_drafts)
    settings = {"max_tokens": 20, "min_tokens": 5, "stop_token_ids": [text[bonus]], "ignore_eos": True}
    before = counters(llm)["cycles"]
    assert generate(llm, [prompt], **settings) == [text[: bonus + 1]]
    assert counters(llm)["cycles"] > before


def test_abort_during_generation(model: ReferenceModel, llm: Any) -> None:
    from vllm import SamplingParams

    prompts = random_prompts([20, 90, 50, 130], 24, seed=10)
    expected = solo(model, prompts, 60, eos_token_id=-1)
    params = SamplingParams(temperature=0, max_tokens=60, detokenize=False, ignore_eos=True)
    core = llm.llm_engine
    names = [core.add_request(str(i), {"prompt_token_ids": ids}, params) for i, ids in enumerate(prompts)]
    finished: dict[str, list[int]] = {}
    for step in range(400):
        if step == 6:
            core.abort_request(["1"])
        if step == 10:
            core.abort_request(["3"])
        for output in core.step():
            if output.finished and output.outputs[0].finish_reason != "abort":
                finished[output.request_id] = list(output.outputs[0].token_ids)
        if not core.has_unfinished_requests():
            break
    assert names is not None
    assert finished == {"0": expected[0], "2": expected[2]}
    # State of an aborted request must not leak into the next request of the same batch row.
    assert generate(llm, prompts, max_tokens=60, ignore_eos=True) == expected


def test_end_of_sequence_inside_a_block(model: ReferenceModel, llm: Any) -> None:
    prompts = random_prompts([10] * 8, 24, seed=12)
    expected = solo(model, prompts, 80)
    assert any(ids[-1] == 11 and len(ids) < 80 for ids in expected)
    assert generate(llm, prompts, max_tokens=80) == expected


@pytest.mark.parametrize("budget", [1, 2, 7, 8, 9])
def test_max_tokens_is_never_overshot(model: ReferenceModel, llm: Any, budget: int) -> None:
    prompts = random_prompts([5, 40], 24, seed=13)
    expected = solo(model, prompts, budget, eos_token_id=-1)
    assert generate(llm, prompts, max_tokens=budget, ignore_eos=True) == expected


def test_random_drafts_add_cycles_but_change_no_token(model: ReferenceModel, folder: Path) -> None:
    """Drafts that are almost never accepted."""
    prompts = random_prompts([4, 60, 150], 24, seed=2)
    expected = solo(model, prompts, 60)
    generator = torch.Generator().manual_seed(0)

    def random_drafts(block: Any) -> list[int]:
        return torch.randint(0, 24, (block.length - 1,), generator=generator).tolist()

    def oracle_drafts(block: Any) -> list[int]:
        ids = next(p + e for p, e in zip(prompts, expected, strict=True) if _is_at(p + e, block))
        drafts = ids[block.prefix + 1 : block.prefix + block.length]
        return drafts + [0] * (block.length - 1 - len(drafts))

    def _is_at(ids: list[int], block: Any) -> bool:
        return len(ids) > block.prefix and ids[block.prefix] == block.tokens[0]

    cycles = {}
    with engine(folder, spec=True, max_num_seqs=1) as llm:
        for name, draft in (("random", random_drafts), ("oracle", oracle_drafts)):
            replace_drafts(llm, draft)
            before = counters(llm)["cycles"]
            assert generate(llm, prompts, max_tokens=60) == expected
            cycles[name] = counters(llm)["cycles"] - before
    assert cycles["random"] > 2 * cycles["oracle"]


def test_drafting_in_groups_changes_nothing(model: ReferenceModel, folder: Path) -> None:
    """A draft forward has at most max_num_batched_tokens tokens; more blocks take several forwards.

    Not with this extension's scheduler, which limits drafts to the room of a step.
    """
    prompts = random_prompts([90, 3, 40, 7, 60], 24, seed=4)
    expected = solo(model, prompts, 24)
    scheduler = "vllm.v1.core.sched.scheduler.Scheduler"
    forwards = {}
    for tokens in (256, 20):
        with engine(folder, spec=True, max_num_batched_tokens=tokens, scheduler_cls=scheduler) as llm:
            assert generate(llm, prompts) == expected
            forwards[tokens] = counters(llm)["draft_forwards"]
    assert forwards[20] > forwards[256]


@pytest.mark.parametrize("caching", [True, False])
def test_prefix_caching(model: ReferenceModel, folder: Path, caching: bool) -> None:
    (shared,) = random_prompts([100], 24, seed=8)
    prompts = [shared + tail for tail in random_prompts([1, 5, 30], 24, seed=9)]
    expected = solo(model, prompts, 24)
    with engine(folder, spec=True, enable_prefix_caching=caching, block_size=32) as llm:
        for _ in range(2):
            assert generate(llm, prompts) == expected
            assert [generate(llm, [ids])[0] for ids in prompts] == expected
        hits = metric(llm, "vllm:prefix_cache_hits")
        assert hits > 0 if caching else hits == 0


def test_chunked_prefill_with_a_tiny_budget(model: ReferenceModel, folder: Path) -> None:
    prompts = random_prompts([1, 200, 33, 120, 7], 24, seed=4)
    with engine(folder, spec=True, max_num_batched_tokens=24, max_num_seqs=4) as llm:
        assert generate(llm, prompts, max_tokens=30) == solo(model, prompts, 30)
        assert counters(llm)["target_forwards"] >= sum(map(len, prompts)) / 24


def test_preemption(model: ReferenceModel, folder: Path) -> None:
    prompts = random_prompts([60, 70, 80, 90], 24, seed=6)
    expected = solo(model, prompts, 100, eos_token_id=-1)
    with engine(folder, spec=True, num_gpu_blocks_override=14, block_size=32, max_num_seqs=4, max_model_len=256) as llm:
        assert generate(llm, prompts, max_tokens=100, ignore_eos=True) == expected
        assert metric(llm, "vllm:num_preemptions") > 0


def test_blocks_are_cut_short_at_max_model_len(model: ReferenceModel, folder: Path) -> None:
    prompts = random_prompts([91, 88, 60, 2], 24, seed=11)
    expected = [
        ar_generate(model, ids, 96 - len(ids), eos_token_id=-1).ids[len(ids) :][: 96 - len(ids)] for ids in prompts
    ]
    with engine(folder, spec=True, max_model_len=96) as llm:
        found = generate(llm, prompts, max_tokens=500, ignore_eos=True)
        assert found == expected
        # The row near the limit must not turn off the drafts of other rows.
        assert counters(llm)["cycles"] > 90


def test_lowered_length_limit_reaches_the_proposer(model: ReferenceModel, folder: Path) -> None:
    """``--max-model-len auto``: the limit becomes what the cache holds, after the workers have started."""
    (prompt,) = random_prompts([100], 24, seed=14)
    with engine(folder, spec=True, max_model_len=-1, kv_cache_memory_bytes=1 << 18) as llm:
        running = runner(llm)
        limit = running.max_model_len
        assert limit < 256
        assert running.drafter.sizes.max_model_len == limit
        assert running.effective_drafter_max_model_len == limit + 7
        expected = ar_generate(model, prompt, limit - 100, eos_token_id=-1).ids[100:]
        assert generate(llm, [prompt], max_tokens=500, ignore_eos=True) == [expected]


def test_the_mask_token_is_never_emitted(tmp_path: Path) -> None:
    """Weights that make the mask token win every argmax if it were allowed to."""
    model = random_model(small_config(eos_token_id=None), seed=9)
    with torch.no_grad():
        mask_row = model.config.mask_token_id
        direction = model.encoder.norm.weight * 0 + 1
        model.diffusion_head.weight += 0.05 * direction
        model.diffusion_head.weight[mask_row] = 3.0
    folder = save(model, tmp_path)
    prompts = random_prompts([3, 50], 24)
    with engine(folder, spec=True, options={"draft_threshold": 0.9}) as llm:
        drafts: list[int] = []
        watch_blocks(llm, lambda block: drafts.extend(block.tokens))
        greedy = generate(llm, prompts, max_tokens=40)
        sampled = generate(llm, prompts, max_tokens=40, temperature=1.0, seed=1)
    assert greedy == solo(model, prompts, 40)
    assert mask_row not in {*drafts, *(token for ids in greedy + sampled for token in ids)}


def test_sampling_options_reach_the_verify_pass(folder: Path) -> None:
    """min_tokens, penalties and stop ids act on the verify logits, so self-speculation keeps them.

    (vLLM itself refuses min_p and logit_bias together with any speculative decoding.)
    """
    prompts = random_prompts([12, 45], 24, seed=14)
    cases: list[dict[str, Any]] = [
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5},
        {"min_tokens": 30, "max_tokens": 40, "stop_token_ids": [11]},
        {"stop_token_ids": [9]},
    ]
    with engine(folder) as llm:
        expected = [generate(llm, prompts, **case) for case in cases]
    with engine(folder, spec=True) as llm:
        assert [generate(llm, prompts, **case) for case in cases] == expected
        assert accepted(llm) > 0
