"""Branches on the second runner: AR's text, one forward a cycle, and the reference's cycles and hits."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.adapters import random_adapter
from tests.support.engines import branches, counters, generate, random_prompts, runner
from tests.support.models import random_model, save, small_config
from tests.support.second_runner import second_engine
from vllm_nld.branches.places import Choice, every_place, likeliest_places
from vllm_nld.checkpoints.draft_lora import FOLDER, TARGETS
from vllm_nld.options import NLDOptions
from vllm_nld.reference import ReferenceModel, ar_generate, branch_spec_generate
from vllm_nld.speculator.table import default_branches

VOCAB, LENGTH = 24, 20
WAYS: dict[str, tuple[dict[str, Any], Choice, bool]] = {
    "three": ({"branches": 3}, likeliest_places(3, 8), True),
    "short": ({"branches": 6, "branch_length": 4}, likeliest_places(6, 4), True),
    "all": ({"branches": "all"}, every_place(8), False),
}
PROMPTS = dict(zip(WAYS, random_prompts([1, 70, 21], VOCAB, seed=7), strict=True))


@pytest.fixture(scope="module")
def model() -> ReferenceModel:
    return random_model(small_config(block_size=8), seed=3)


@pytest.fixture(scope="module")
def folder(model: ReferenceModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With an adapter on all projections and for the mask's row."""
    folder = save(model, tmp_path_factory.mktemp("branches"))
    model.draft_adapter = random_adapter(model.config, targets=TARGETS, mask_row=True)
    model.draft_adapter.write(folder / FOLDER, "somewhere")
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[Any]:
    """An engine with asynchronous scheduling."""
    with second_engine(folder, max_num_batched_tokens=160) as llm:
        yield llm


def texts(model: ReferenceModel, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    return [ar_generate(model, ids, tokens).ids[len(ids) :] for ids in prompts]


def expected_hits(model: ReferenceModel, prompt: list[int], way: str) -> list[str]:
    """The reference's cycles up to a length, by what was hit; it goes on a little, as an engine's drafts do."""
    _, choose, look_past = WAYS[way]
    found = branch_spec_generate(model, prompt, choose, LENGTH + 17, look_past=look_past, misses_draft=False)
    made, hits = 1, []
    for tokens, hit in zip(found.accepted, found.hits, strict=True):
        if made < LENGTH:
            hits.append(hit)
        made += tokens
    return hits


@pytest.mark.parametrize("way", WAYS)
def test_cycles_are_the_reference_s(llm: Any, model: ReferenceModel, way: str) -> None:
    """One forward a cycle, and no draft forward; hits by kind."""
    prompt, hits = PROMPTS[way], expected_hits(model, PROMPTS[way], way)
    before, counted = counters(llm), branches(llm)
    assert generate(llm, [prompt], [WAYS[way][0]], max_tokens=LENGTH) == texts(model, [prompt], LENGTH)
    spent = {key: value - before[key] for key, value in counters(llm).items()}
    assert spent["draft_forwards"] == 0
    assert spent["target_forwards"] - 1 - len(hits) in (0, 1)  # a step may be on its way at the end
    found = branches(llm) - counted
    for kind in ("guess", "mask"):
        assert found[kind] - hits.count(kind) in (0, 1)
    assert found["tokens"] >= found["run"] > 0
    assert llm.collective_rpc("nld_tally")[0]["forwards"].get("draft", 0) <= counters(llm)["draft_forwards"] + 1


def test_a_batch_of_all_kinds_of_requests(llm: Any, model: ReferenceModel) -> None:
    """Some branch, others do not; prompts are cut into pieces; at times there is no room for branches."""
    prompts = random_prompts([5, 110, 33, 9, 64, 101], VOCAB, seed=2)
    each: list[dict[str, Any]] = [own for own, _, _ in WAYS.values()] + [
        {"mode": "ar"},
        {},
        {"mode": "auto", "branches": 2},
    ]
    counted = branches(llm)
    assert generate(llm, prompts, each, max_tokens=14) == texts(model, prompts, 14)
    found = branches(llm) - counted
    assert found["guess"] + found["mask"] > 8


def test_texts_end_at_the_engine_s_last_position(llm: Any, model: ReferenceModel) -> None:
    prompts = random_prompts([120, 126, 127, 113], VOCAB, seed=5)
    each = [{"branches": 3}, {"branches": "all"}, {"branches": 2}, {"branches": 5}]
    assert generate(llm, prompts, each, max_tokens=50) == [texts(model, [ids], 128 - len(ids))[0] for ids in prompts]


def test_without_room_requests_draft_by_themselves(llm: Any, model: ReferenceModel) -> None:
    """No branch fits into the step: draft forwards, as without branches."""
    prompts = random_prompts([9, 12], VOCAB, seed=4)
    branching = runner(llm).speculator.branching
    most, branching.max_tokens = branching.max_tokens, 24
    before = counters(llm)
    try:
        assert generate(llm, prompts, [{"branches": 3}] * 2, max_tokens=9) == texts(model, prompts, 9)
    finally:
        branching.max_tokens = most
    assert counters(llm)["draft_forwards"] > before["draft_forwards"]
    known = np.flatnonzero(runner(llm).speculator.table.branch_counts)[:1]
    drafting = np.ones(1, dtype=bool)
    assert branching.rows(known, drafting, tokens=20).all()
    assert not branching.rows(known, drafting, tokens=most - 5).any()  # a prompt fills the steps


def test_sampled_text_is_ar_s_with_the_same_seed(llm: Any) -> None:
    """Drafts are drawn from branches, and not; also without a seed, which the kernels' tests judge."""
    prompts = random_prompts([8, 30, 11], VOCAB, seed=6)
    settings: dict[str, Any] = {"max_tokens": 6, "temperature": 0.8}
    expected = generate(llm, prompts, [{"mode": "ar"}] * 3, seed=3, **settings)
    each: list[dict[str, Any]] = [{"branches": 3}, {"branches": "all"}, {"branches": 4, "sampled_drafts": False}]
    assert generate(llm, prompts, each, seed=3, **settings) == expected
    assert [len(text) for text in generate(llm, prompts[:2], each[:2], **settings)] == [6] * 2


def test_a_recorded_step_serves_every_step(llm: Any, model: ReferenceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA graph would hold: the branches of the engine's own options, for more requests than there are.

    A CPU's causal metadata is made anew in each step; everything of the branches is what it was at the capture.
    """
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import set_forward_context
    from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, prepare_inputs_to_capture

    from vllm_nld.vllm_glue.second_runner import leave_graphs

    own = runner(llm)
    branching, block, slots = own.speculator.branching, own.speculator.block_length, 3
    monkeypatch.setattr(branching, "_default", (3, 9))
    monkeypatch.setattr(branching, "_captured", {})
    latest, replayed, left = [{}], [0], [0]
    prepare = own.model_state.prepare_attn

    def watching(*args: Any, **named: Any) -> Any:
        latest[0] = prepare(*args, **named)
        return latest[0]

    def forward(metadata: Any, slot_mapping: Any) -> Any:
        tokens, buffers = slots * block, own.input_buffers
        with set_forward_context(metadata, own.vllm_config, num_tokens=tokens, slot_mapping=slot_mapping):
            return own.model(input_ids=buffers.input_ids[:tokens], positions=buffers.positions[:tokens])

    settings = {"full_cudagraph": True, "max_query_len": block}  # vLLM 0.26 knows neither, and needs neither
    known = inspect.signature(prepare_inputs_to_capture).parameters
    state = prepare_inputs_to_capture(
        slots, slots * block, own.model_state, own.input_buffers, own.block_tables, own.attn_groups,
        own.kv_cache_config, **{name: value for name, value in settings.items() if name in known},
    )  # fmt: skip
    forward(*state)
    captured = state.attn_metadata
    monkeypatch.setattr(own.model_state, "prepare_attn", watching)

    def replay(_: Any) -> Any:
        replayed[0] += 1
        return forward(
            {name: replace(captured[name], causal=latest[0][name]) for name in captured}, state.slot_mappings
        )

    def dispatch(num_reqs: int, num_tokens: int, uniform: int | None, **_: Any) -> Any:
        whole = uniform == block and num_reqs <= slots
        mode = CUDAGraphMode.FULL if whole else CUDAGraphMode.PIECEWISE
        return BatchExecutionDescriptor(
            mode, slots * block if whole else num_tokens, slots if whole else num_reqs, uniform
        )

    def leaves(description: Any) -> bool:
        found = branching.leaves_graph(description)
        left[0] += found
        return found

    manager = SimpleNamespace(dispatch=dispatch)
    leave_graphs(manager, leaves)
    monkeypatch.setattr(
        own.cudagraph_manager, "dispatch", lambda *args, **named: no_pieces(manager.dispatch(*args, **named))
    )
    monkeypatch.setattr(own.cudagraph_manager, "run_fullgraph", replay)
    prompts = random_prompts([7, 40], VOCAB, seed=4)
    counted = branches(llm)
    each: list[dict[str, Any]] = [{"branches": 3}, {"branches": 2, "branch_length": 4}]
    assert generate(llm, prompts, each, max_tokens=12) == texts(model, prompts, 12)
    found = branches(llm) - counted
    assert replayed[0] > 3 and found["guess"] + found["mask"] > 5
    monkeypatch.setattr(branching, "_captured", {})
    before = replayed[0], left[0]
    assert generate(llm, prompts[:1], each[:1], max_tokens=12) == texts(model, prompts[:1], 12)
    assert left[0] > before[1] and replayed[0] - before[0] <= 1  # a graph without branches does not serve


def test_an_older_plan_adds_nothing_to_a_graph_without_branches(llm: Any) -> None:
    """A graph was chosen by the last step; a request that was not in it may have been planned before."""
    from vllm.config import CUDAGraphMode

    branching, causal = runner(llm).speculator.branching, {"layer": object()}
    batch = SimpleNamespace(idx_mapping_np=np.array([0]), num_tokens_after_padding=16, num_reqs_after_padding=16)
    for mode in (CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL):  # a whole graph of 16 single tokens, not of two blocks
        branching._planned[0] = True
        assert branching.lay_out(batch, None, causal, mode) is causal
        assert not branching._planned[0]


def test_warm_up_stays_within_the_buffers(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    branching, laid = runner(llm).speculator.branching, list[Any]()
    row = torch.ones(1, dtype=torch.int32)
    step = SimpleNamespace(seq_lens=row, requests=row, block_table=None)
    monkeypatch.setattr(branching, "_fill", lambda own, *_, **__: laid.append(own))
    for method in ("_find", "_plan"):
        monkeypatch.setattr(branching, method, lambda *_: None)
    for default in ((20, 9), (32, 161), (2, 9)):
        monkeypatch.setattr(branching, "_default", default)
        branching.warm_up(step, SimpleNamespace(valid=None, drafts=None))
    assert [own.count for own in laid] == [17, 2]  # none, where not even one fits
    assert all(own.tokens <= branching.max_tokens for own in laid)


def test_quadratic_has_no_more_branches_than_a_plan_has_places() -> None:
    options = NLDOptions(mode="self_speculation", branches="all")
    assert default_branches(options, 100) == (64, 64)


def no_pieces(description: Any) -> Any:
    """Run eagerly what a CPU has no graph for."""
    from vllm.config import CUDAGraphMode

    whole = description.cg_mode == CUDAGraphMode.FULL
    return description if whole else replace(description, cg_mode=CUDAGraphMode.NONE)


def test_synchronous_steps_branch_as_well(folder: Path, model: ReferenceModel) -> None:
    with second_engine(folder, asynchronous=False, options={"branches": 3}, max_num_seqs=2) as llm:
        before = counters(llm)
        assert generate(llm, list(PROMPTS.values()), max_tokens=10) == texts(model, list(PROMPTS.values()), 10)
        assert counters(llm)["draft_forwards"] == before["draft_forwards"]
        assert branches(llm)["mask"] > 3
