"""Tensor parallelism on the second runner: two processes, asynchronous, every mode; ranks draft the same tokens."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.support.adapters import random_adapter
from tests.support.engines import random_prompts
from tests.support.interpreted import INTERPRETING
from tests.support.models import random_model, save, small_config
from tests.support.second_runner import second_engine, watch_worker
from tests.v2.test_exact_text import reference_drafts
from vllm_nld.checkpoints.draft_lora import FOLDER, TARGETS
from vllm_nld.reference import DraftAdapter, ReferenceModel, ar_generate
from vllm_nld.reference.diffusion import generate as diffuse

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="a GPU machine has one GPU")

VOCAB, TOKENS, BLOCK = 24, 7, 8
ASKED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"draft_adapter": False, "block_length": 4}, {}),
    ({"mode": "auto"}, {}),
    ({"mode": "diffusion", "threshold": 0.4}, {}),
    ({}, {"temperature": 0.8, "seed": 3}),
    ({"mode": "ar"}, {"temperature": 0.8, "seed": 3}),
    ({}, {"temperature": 0.8}),
]
"""Requests' options, and what else they ask for. Those with a seed are one request, decoded in two ways."""
SEEDED, UNSEEDED = 4, 6


@pytest.fixture(scope="module")
def model() -> ReferenceModel:
    return random_model(small_config(), 1)


@pytest.fixture(scope="module")
def adapter(model: ReferenceModel) -> DraftAdapter:
    return random_adapter(model.config, seed=2, targets=TARGETS, mask_row=True)


@pytest.fixture(scope="module")
def llm(model: ReferenceModel, adapter: DraftAdapter, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two ranks. They are forked, because this process has given Triton its placeholder before it imported vLLM."""
    from vllm.v1.executor import multiproc_executor

    folder = save(model, tmp_path_factory.mktemp("parallel"))
    adapter.write(folder / FOLDER, "somewhere")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process has none of OpenMP's threads, and would wait for them
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiproc_executor, "get_mp_context", lambda: multiprocessing.get_context("fork"))
        patch.setattr(
            torch._dynamo.config, "disable", True
        )  # vLLM compiles a split embedding: that asks Triton's driver
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "200")  # in case ranks wait for each other
        with second_engine(folder, tensor_parallel_size=2, max_num_seqs=len(ASKED)) as made:
            made.collective_rpc(watch_worker)
            yield made
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    found = random_prompts([19, 8, 11, 14, 7, 7, 6], VOCAB, seed=12)
    found[SEEDED + 1] = found[SEEDED]
    return found


@pytest.fixture(scope="module")
def texts(llm: Any, prompts: list[list[int]]) -> list[list[int]]:
    """All requests in one batch."""
    from vllm import SamplingParams

    own = {"temperature": 0, "max_tokens": TOKENS, "detokenize": False}
    params = [SamplingParams(**(own | settings), extra_args={"nld": nld}) for nld, settings in ASKED]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def drafts(worker: Any) -> dict[tuple[tuple[int, ...], int], list[int]]:
    return dict(worker.seen_drafts)


def device_state(worker: Any) -> list[torch.Tensor]:
    """The speculator's buffers, and what vLLM drew."""
    runner = worker.model_runner
    buffers, states = runner.speculator.buffers, runner.req_states
    tensors = [value for value in vars(buffers).values() if isinstance(value, torch.Tensor)]
    return [tensor.clone() for tensor in [*tensors, states.last_sampled_tokens, states.draft_tokens]]


def test_texts_are_those_of_the_whole_model(
    texts: list[list[int]], prompts: list[list[int]], model: ReferenceModel
) -> None:
    expected = [ar_generate(model, ids, TOKENS).ids[len(ids) :] for ids in prompts]
    diffusing = next(index for index, (nld, _) in enumerate(ASKED) if nld.get("mode") == "diffusion")
    ids = prompts[diffusing]
    expected[diffusing] = diffuse(model, ids, TOKENS, sampler="confidence_threshold", threshold=0.4).ids[len(ids) :]
    assert texts[:SEEDED] == expected[:SEEDED]
    assert texts[SEEDED] == texts[SEEDED + 1] != expected[SEEDED]


def test_ranks_draft_the_same_tokens_by_split_weights(
    llm: Any, texts: list[list[int]], prompts: list[list[int]], model: ReferenceModel, adapter: DraftAdapter
) -> None:
    """The draft adapter is split, too: with it and without, drafts are the whole model's."""
    first, second = llm.collective_rpc(drafts)
    assert first == second
    for index, own_adapter, length in ((0, adapter, BLOCK), (1, None, 4)):
        whole = prompts[index] + texts[index]
        own = {place: ids for (start, place), ids in first.items() if start == tuple(whole[:3])}
        model.draft_adapter = own_adapter
        expected = {place: reference_drafts(model, whole[:place], length) for place in own if place <= len(whole)}
        model.draft_adapter = None
        assert expected and all(own[place] == ids for place, ids in expected.items())
    assert any(start == tuple(prompts[UNSEEDED][:3]) for start, _ in first)  # drawn from gathered logits


def branching_state(worker: Any) -> list[torch.Tensor]:
    """What was planned, what was run and what was hit; not ``_seen``, which only the rank that reports counters has."""
    state = vars(worker.model_runner.speculator.branching)
    return [value.clone() for name, value in state.items() if isinstance(value, torch.Tensor) and name != "_seen"]


def test_ranks_run_and_hit_the_same_branches(llm: Any, prompts: list[list[int]], model: ReferenceModel) -> None:
    """Branches are planned by candidates of gathered logits, and drawn drafts come from them."""
    from vllm import SamplingParams

    asked = [({"branches": 3}, 0.0), ({"branches": "all"}, 0.0), ({"branches": 2}, 0.8)]
    params = [
        SamplingParams(temperature=temperature, max_tokens=TOKENS, detokenize=False, extra_args={"nld": nld})
        for nld, temperature in asked
    ]
    given = [{"prompt_token_ids": ids} for ids in prompts[:3]]
    outputs = llm.generate(given, params, use_tqdm=False)
    expected = [ar_generate(model, ids, TOKENS).ids[len(ids) :] for ids in prompts[:2]]
    assert [list(output.outputs[0].token_ids) for output in outputs[:2]] == expected
    first, second = llm.collective_rpc(branching_state)
    assert len(first) > 3 and all(one.equal(other) for one, other in zip(first, second, strict=True))
    run, *_ = (tally["branches"] for tally in llm.collective_rpc("nld_tally"))
    assert run["guess"] + run["mask"] > 3


def test_ranks_hold_the_same_state(llm: Any, texts: list[list[int]]) -> None:
    """Every rank prepares its own inputs and draws its own tokens; nothing is sent between them but activations."""
    first, second = llm.collective_rpc(device_state)
    assert len(first) > 10 and any(tensor.any() for tensor in first)
    assert all(one.equal(other) for one, other in zip(first, second, strict=True))
    assert len({tuple(sorted(counts.items())) for counts in llm.collective_rpc("nld_counters")}) == 1
