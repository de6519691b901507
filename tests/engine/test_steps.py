"""Contents of a step: chunks of seeded prompts, cached prompts next to grammars, and shares of the budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.engines import engine, generate, metric, random_prompts
from tests.support.models import random_model, save, save_first_layers, small_config
from vllm_nld.checkpoints.held_out import held_out_prompts
from vllm_nld.reference import ReferenceModel, ar_generate
from vllm_nld.serving.ledger import Tally

BLOCK = 16
VLLM_S = "vllm.v1.core.sched.scheduler.Scheduler"
CRAMPED: dict[str, Any] = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 48,
    "num_gpu_blocks_override": 16,
    "block_size": 32,
    "max_model_len": 224,
}


@pytest.fixture(scope="module")
def model() -> ReferenceModel:
    return random_model(small_config(eos_token_id=None, block_size=BLOCK), seed=3)


@pytest.fixture(scope="module")
def folder(model: ReferenceModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(model, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def cramped(folder: Path) -> Iterator[Any]:
    with engine(folder, spec=True, **CRAMPED) as made:
        yield made


@pytest.fixture(scope="module")
def crowded(folder: Path) -> Iterator[Any]:
    """Eight full blocks are twice the budget."""
    with engine(folder, spec=True, max_num_seqs=9, max_num_batched_tokens=64) as made:
        yield made


def add(llm: Any, name: str, prompt: list[int], budget: int, mode: str, **params: Any) -> None:
    from vllm import SamplingParams

    given = {"temperature": 0, "max_tokens": budget, "detokenize": False, "extra_args": {"nld": {"mode": mode}}}
    llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, SamplingParams(**given | params))


def drain(llm: Any, limit: int = 2000) -> dict[str, list[int]]:
    """Run to the end, and fail if the engine hangs; return the texts."""
    core, texts = llm.llm_engine, {}
    for _ in range(limit):
        if not core.has_unfinished_requests():
            return texts
        for output in core.step():
            texts[output.request_id] = list(output.outputs[0].token_ids)
    raise AssertionError(f"not done after {limit} steps: {texts}")


class LeftOut:
    """Counts for how many steps in a row a running request was left out that was not parked."""

    def __init__(self, llm: Any) -> None:
        self.scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        self.longest = self.steps = 0
        self.now: Counter[str] = Counter()

    def __enter__(self) -> LeftOut:
        self._schedule = self.scheduler.schedule
        self.scheduler.schedule = self._watch
        return self

    def __exit__(self, *_: object) -> None:
        self.scheduler.schedule = self._schedule

    def _watch(self, *args: Any) -> Any:
        output = self._schedule(*args)
        self.steps += 1
        running = {request.request_id for request in self.scheduler.running} - getattr(self.scheduler, "parked", set())
        out = running - set(output.num_scheduled_tokens)
        self.now = Counter({name: self.now[name] + 1 for name in out})
        self.longest = max(self.longest, *self.now.values(), 0)
        return output


@pytest.mark.parametrize("speculates", [False, True])
def test_seeded_request_may_be_chunked_and_preempted(folder: Path, speculates: bool, request: Any) -> None:
    """vLLM takes back the random numbers of discarded samples with ``set_offset``, which CPUs lack.

    The text equals that of an unchunked prompt, because only kept tokens advance a request's generator.
    """
    prompts = random_prompts([40, 44, 36, 42], 24, seed=6)
    each: dict[str, Any] = {"temperature": 1.0, "seed": 7, "max_tokens": 80, "extra_args": {"nld": {"mode": "ar"}}}

    def check(llm: Any) -> None:
        alone = [generate(llm, [prompt], **each)[0] for prompt in prompts]
        assert generate(llm, prompts, **each) == alone
        assert metric(llm, "vllm:num_preemptions") > 0

    if speculates:
        check(request.getfixturevalue("cramped"))
        return
    with engine(folder, **CRAMPED) as llm:
        check(llm)


def test_block_counts_when_it_is_verified(cramped: Any) -> None:
    """Blocks of requests that end or are preempted before do not count for the acceptance length."""
    prompts = random_prompts([40, 44, 36, 42, 30], 24, seed=8)
    before, drafts = _tally(cramped), metric(cramped, "vllm:spec_decode_num_drafts")
    preemptions = metric(cramped, "vllm:num_preemptions")
    for index, prompt in enumerate(prompts):
        add(cramped, str(index), prompt, 90, "self_speculation", ignore_eos=True)
    for _ in range(6):
        cramped.llm_engine.step()
    cramped.llm_engine.abort_request(["1"])
    drain(cramped)
    assert metric(cramped, "vllm:num_preemptions") > preemptions
    spent = Tally.between(before, _tally(cramped))
    verified = metric(cramped, "vllm:spec_decode_num_drafts") - drafts
    assert spent.blocks["self_speculation"] == verified > 0
    assert spent.forwards["draft"] > verified, "one per drafted block: some were never verified"


def _tally(llm: Any) -> dict[str, dict[str, int]]:
    return llm.collective_rpc("nld_tally")[0]


@pytest.mark.parametrize("mode", ["self_speculation", "diffusion"])
def test_full_blocks_leave_no_request_out(model: ReferenceModel, crowded: Any, mode: str) -> None:
    prompts = random_prompts([20, 21, 22, 23, 24, 25, 26, 27], 24, seed=4)
    for index, prompt in enumerate(prompts):
        add(crowded, str(index), prompt, 100, mode)
    with LeftOut(crowded) as watch:
        texts = drain(crowded)
    assert watch.longest <= 1, f"left out of {watch.longest} steps in a row, of {watch.steps}"
    if mode == "self_speculation":
        assert list(texts.values()) == [ar_generate(model, ids, 100).ids[len(ids) :] for ids in prompts]


def test_full_blocks_leave_room_for_a_new_request(model: ReferenceModel, crowded: Any) -> None:
    prompts = random_prompts([20, 21, 22, 23, 24, 25, 26, 27, 90], 24, seed=5)
    for index, prompt in enumerate(prompts[:-1]):
        add(crowded, str(index), prompt, 150, "self_speculation")
    for _ in range(6):
        crowded.llm_engine.step()
    add(crowded, "new", prompts[-1], 1, "ar")
    steps = 1
    while not any(output.request_id == "new" and output.finished for output in crowded.llm_engine.step()):
        steps += 1
    drain(crowded)
    assert steps <= -(-90 // (64 // 9)), "its share of every step is 7 tokens"


def test_budget_below_a_block_admits_a_cached_prompt(model: ReferenceModel, folder: Path) -> None:
    """vLLM pads a request with one token to compute to a whole block, and does not admit it if that does not fit."""
    prompts = random_prompts([65, 33], 24, seed=7)
    settings = {"max_num_batched_tokens": 12, "max_num_seqs": 4, "enable_prefix_caching": True, "block_size": 32}
    expected = [ar_generate(model, ids, 30).ids[len(ids) :] for ids in prompts]
    with engine(folder, spec=True, **settings) as llm:
        for _ in range(2):
            for index, prompt in enumerate(prompts):
                add(llm, str(index), prompt, 30, "self_speculation")
            texts = drain(llm)
            assert [texts[str(index)] for index in range(2)] == expected
        assert metric(llm, "vllm:prefix_cache_hits") == 96


@pytest.mark.parametrize("settings", [{}, {"scheduler_cls": VLLM_S}, {"enable_lora": True}], ids=str)
def test_grammars_hold_next_to_a_cached_prompt(settings: dict[str, Any], tmp_path: Path) -> None:
    """A step and a grammar's bitmask must drop the same rows of vLLM's padding."""
    from vllm import SamplingParams
    from vllm.config import StructuredOutputsConfig
    from vllm.sampling_params import StructuredOutputsParams

    common = {"skip_tokenizer_init": False, "max_num_seqs": 8, "enable_prefix_caching": True, "block_size": 32}
    common["structured_outputs_config"] = StructuredOutputsConfig(backend="xgrammar")
    ((_, text),) = held_out_prompts(1, characters=900)
    with engine(save_first_layers(tmp_path / "tiny"), spec=True, **common | settings) as llm:
        prompt = llm.llm_engine.get_tokenizer().encode(text)[:129]
        assert len(prompt) == 129, "four pages and one token"
        inputs = [{"prompt_token_ids": prompt}] * 4
        for mode in ("ar", "self_speculation", "auto", "diffusion"):
            params = SamplingParams(
                temperature=0,
                max_tokens=20,
                structured_outputs=StructuredOutputsParams(choice=["yes", "no", "import os"]),
                extra_args={"nld": {"mode": mode}},
            )
            for _ in range(2):
                outputs = llm.generate(inputs, params, use_tqdm=False)
                texts = {(output.outputs[0].finish_reason, output.outputs[0].text) for output in outputs}
                assert len(texts) == 1, (mode, texts)
                assert texts < {("stop", "yes"), ("stop", "no"), ("stop", "import os")}, (mode, texts)
        assert metric(llm, "vllm:prefix_cache_hits") > 0
