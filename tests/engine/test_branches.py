"""Self-speculation with branches in a real engine: AR's text, and the reference's forwards and hits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.adapters import random_adapter
from tests.support.chi_square import chi_square_p_value
from tests.support.engines import branches, counters, engine, generate, random_prompts, runner
from tests.support.models import random_model, save, small_config
from vllm_nld.auto.search import Search
from vllm_nld.branches.places import every_place, likeliest_places
from vllm_nld.checkpoints.draft_lora import FOLDER, TARGETS
from vllm_nld.draft_pass.block import Block
from vllm_nld.proposer.branching import Branching
from vllm_nld.reference import ReferenceModel, ar_generate, branch_spec_generate

WAYS: dict[str, tuple[dict[str, Any], Any, bool]] = {
    "three": ({"branches": 3}, likeliest_places(3, 8), True),
    "short": ({"branches": 6, "branch_length": 4}, likeliest_places(6, 4), True),
    "all": ({"branches": "all"}, every_place(8), False),
}
PROMPTS = random_prompts([1, 70], 24, seed=7)
LENGTH = 32


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
def test_every_forward_equals_the_reference(traced: bool, tmp_path: Path) -> None:
    """Same text, same NFE and same hits, request by request, with an adapter on all projections and the mask's row."""
    model = random_model(small_config(eos_token_id=11, block_size=8), seed=3)
    folder = save(model, tmp_path)
    model.draft_adapter = random_adapter(model.config, targets=TARGETS, mask_row=True)
    model.draft_adapter.write(folder / FOLDER, "somewhere")
    hits = 0
    # Other tests compile kernels: this one needs only the graph that they are compiled from.
    graphs = {"mode": "DYNAMO_TRACE_ONCE", "backend": "eager"}  # in other modes vLLM has kernels compiled on a CPU
    settings: dict[str, Any] = {"enforce_eager": False, "compilation_config": graphs}
    with engine(folder, spec=True, max_num_seqs=1, **(settings if traced else {})) as llm:
        for options, choose, look_past in list(WAYS.values())[1 if traced else 0 :]:
            for prompt in PROMPTS:
                before, counted = counters(llm), branches(llm)
                (tokens,) = generate(llm, [prompt], [options], max_tokens=LENGTH)
                spent = {key: value - before[key] for key, value in counters(llm).items()}
                expected = branch_spec_generate(model, prompt, choose, LENGTH, look_past=look_past, misses_draft=False)
                assert tokens == expected.ids[len(prompt) :] == ar_generate(model, prompt, LENGTH).ids[len(prompt) :]
                assert (spent["target_forwards"], spent["draft_forwards"]) == (expected.nfe, 0)
                used = expected.hits[:-1]  # after the last cycle there is nothing to draft for
                found = branches(llm) - counted
                assert [found[kind] for kind in ("guess", "mask")] == [used.count(kind) for kind in ("guess", "mask")]
                hits += len(used) - used.count("none")
    assert hits > 10


def test_a_batch_of_all_kinds_of_requests(tmp_path: Path) -> None:
    """Some requests branch, others do not; prompts are cut into pieces, and few tokens fit into a step."""
    model = random_model(small_config(block_size=8), seed=1)
    prompts = random_prompts([5, 70, 33, 9, 64, 40, 12, 21], 24, seed=2)
    each: list[dict[str, Any]] = [own for own, _, _ in WAYS.values()] * 2 + [{"mode": "ar"}, {"branches": "auto"}]
    with engine(save(model, tmp_path), spec=True, max_num_batched_tokens=64, max_num_seqs=8) as llm:
        expected = [ar_generate(model, prompt, 40).ids[len(prompt) :] for prompt in prompts]
        assert generate(llm, prompts, each, max_tokens=40) == expected
        found = branches(llm)
        assert found["guess"] + found["mask"] > 10
        lookup = [own if "mode" in own else own | {"prompt_lookup": 2} for own in each]
        assert generate(llm, prompts, lookup, max_tokens=40) == expected
        always_draft(llm)
        counted, automatic = branches(llm), [{"mode": "auto", "branches": count} for count in (3, "auto", "all", 1)]
        assert generate(llm, prompts[:4], automatic, max_tokens=20) == [text[:20] for text in expected[:4]]
        found = branches(llm) - counted
        assert found["guess"] + found["mask"] > 5


def always_draft(llm: Any) -> None:
    """Have auto mode draft, which it else does only where it measures a gain."""

    class Drafts(Search):
        def drafting(self, candidates: Any, *_: Any, **__: Any) -> tuple[dict[int, int], float]:
            return {own.row: own.forward.longest for own in candidates}, float("inf")

    auto = runner(llm).drafter.auto
    auto.search = Drafts(auto.search.prices, auto.search.lengths)
    auto.probing.due = lambda *_: None


def test_edges_of_the_room_for_branches(tmp_path: Path) -> None:
    """A draft pass looks past blocks only where there is room; a branch is forgotten with the step that ran it."""
    model = random_model(small_config(block_size=8), seed=1)
    prompts = random_prompts([8] * 4, 24, seed=4)  # which one step runs, so the first draft forward serves all four
    folder = save(model, tmp_path)
    with engine(folder, spec=True, max_num_batched_tokens=8, max_num_seqs=1, max_model_len=64) as llm:
        expected = ar_generate(model, prompts[0], 56).ids[8:]
        assert generate(llm, prompts[:1], [{"branches": 3}], max_tokens=60) == [expected]
    with engine(folder, spec=True, max_num_batched_tokens=32, max_num_seqs=4) as llm:
        draft_pass = runner(llm).drafter.draft_pass
        forwards: list[list[int]] = []
        original = draft_pass._groups

        def groups(blocks: Any) -> Any:
            found = original(blocks)
            forwards.append([sum(block.length for block in group) for group in found])
            return found

        draft_pass._groups = groups
        always_draft(llm)
        generate(llm, prompts, [{"mode": "auto", "branches": 3}] * 4, max_tokens=20, ignore_eos=True)
        assert forwards[0] == [32]
        assert all(len(own) == 1 for own in forwards), "one draft forward serves all requests"
    with engine(folder, spec=True, max_num_seqs=1) as llm:
        for least in range(2, 12):
            before = counters(llm)
            params = {"max_tokens": 16, "min_tokens": least}
            (tokens,) = generate(llm, prompts[:1], [{"branches": "all"}], **params)
            assert tokens == generate(llm, prompts[:1], [{"mode": "ar"}], **params)[0]
            assert counters(llm)["cycles"] > before["cycles"]


REQUESTS, TOKENS, TEMPERATURE = 500, 5, 1.0
CHECKED = 2
"""The token whose draft always comes from a branch: the first forward after the prompt decides one token."""


def chances_of_token(model: ReferenceModel, prompt: list[int]) -> torch.Tensor:
    """AR's exact probabilities of the checked token, float64 ``[vocab]``."""
    vocabulary = torch.arange(model.config.vocab_size)
    texts = torch.cartesian_prod(*[vocabulary] * CHECKED)
    ids = torch.cat((torch.tensor(prompt).expand(len(texts), -1), texts), dim=1)
    with torch.inference_mode():
        chances = model.causal(ids)[:, -CHECKED - 1 :].double().div(TEMPERATURE).softmax(-1)
    before = chances[:, :-1].gather(2, texts[:, :, None]).prod(1)
    return (before * chances[:, -1]).sum(0)


def favor_likely_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the likeliest draft for the drawn one, as if the branch with the best-looking draws were chosen of many."""
    original = Branching.use

    def use(self: Any, draft_pass: Any, states: Any, opened: Mapping[int, Block]) -> None:
        original(self, draft_pass, states, opened)
        for block in opened.values():
            drawn = block.choice.probs if block.choice is not None else None  # type: ignore[attr-defined]
            if drawn is not None:
                block.tokens[1] = int(drawn[0].argmax())

    monkeypatch.setattr(Branching, "use", use)


@pytest.mark.parametrize("biased", [False, True])
def test_sampled_text_has_the_distribution_of_ar(biased: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import SamplingParams

    if biased:
        favor_likely_drafts(monkeypatch)
    model = random_model(small_config(vocab_size=8, block_size=3, num_hidden_layers=1), seed=1)
    (start,) = random_prompts([9], 8, seed=1)
    prompt = ar_generate(model, start, 20).ids
    nld = {"mode": "self_speculation", "branches": "all", "prompt_lookup": 0}
    params = SamplingParams(temperature=TEMPERATURE, max_tokens=TOKENS, detokenize=False, extra_args={"nld": nld})
    with engine(save(model, tmp_path), spec=True, seed=11, max_num_seqs=64) as llm:
        outputs = llm.generate([{"prompt_token_ids": prompt}] * REQUESTS, params, use_tqdm=False)
        assert branches(llm)["mask"] > REQUESTS / 10
    drawn = torch.tensor([output.outputs[0].token_ids[CHECKED] for output in outputs])
    p_value = chi_square_p_value(drawn.bincount(minlength=8), chances_of_token(model, prompt) * REQUESTS)
    assert p_value < 1e-3 if biased else p_value > 1e-3, p_value
