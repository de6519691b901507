"""Requests with more than a greedy text to them: self-speculation on the second runner returns what AR returns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.support.chi_square import chi_square_p_value
from tests.support.engines import accepted, random_prompts, runner
from tests.support.models import random_model, save, small_config
from tests.support.second_runner import second_engine
from vllm_nld.reference import ReferenceModel
from vllm_nld.reference.generate import ids_tensor
from vllm_nld.reference.model import KVCache
from vllm_nld.vllm_glue import second_runner

VOCAB = 12


@pytest.fixture(scope="module")
def model() -> ReferenceModel:
    return random_model(small_config(vocab_size=VOCAB, block_size=4), 4)


@pytest.fixture(scope="module")
def llm(model: ReferenceModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = save(model, tmp_path_factory.mktemp("sampled"))
    with second_engine(folder, max_num_seqs=24, max_logprobs=VOCAB) as llm:
        yield llm


def params(mode: str, **settings: Any) -> Any:
    from vllm import SamplingParams

    own = {"max_tokens": 8, "detokenize": False, "temperature": 0.9, "extra_args": {"nld": {"mode": mode}}}
    return SamplingParams(**(own | settings))


def run(llm: Any, prompts: list[list[int]], settings: list[Any]) -> list[Any]:
    inputs = [{"prompt_token_ids": ids} for ids in prompts]
    return [output for answer in llm.generate(inputs, settings, use_tqdm=False) for output in answer.outputs]


ASKED: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"seed": 1},
    "hot": {"seed": -5, "temperature": 1.7},
    "top k": {"seed": 2, "top_k": 3},
    "top p": {"seed": 3, "top_p": 0.6},
    "repetition": {"temperature": 0.0, "repetition_penalty": 1.4},
    "presence": {"temperature": 0.0, "presence_penalty": 1.1},
    "frequency, seeded": {"seed": 5, "frequency_penalty": 0.8},
    "allowed": {"temperature": 0.0, "allowed_token_ids": [6, 7, 8, 9]},
    "min tokens": {"temperature": 0.0, "min_tokens": 5, "stop_token_ids": [6, 7, 8, 9, 10]},
    "stop token": {"temperature": 0.0, "stop_token_ids": [8, 9]},
    "logprobs": {"temperature": 0.0, "logprobs": 3},
    "logprobs, seeded": {"seed": 6, "logprobs": 2, "prompt_logprobs": 2},
    "several": {"seed": 7, "n": 2},
    "drafts not drawn": {"seed": 8, "extra_args": {"nld": {"sampled_drafts": False}}},
}


def test_what_a_request_asks_for_is_given_as_in_ar(llm: Any) -> None:
    """All of it in one batch, and the same batch in AR: every token, and every log-probability."""
    prompts = random_prompts([5 + index for index in range(len(ASKED))], VOCAB, seed=9)

    def each(mode: str) -> list[Any]:
        found = []
        for settings in ASKED.values():
            own = dict(settings)
            extra = own.pop("extra_args", {"nld": {}})["nld"]
            chosen = {"mode": mode} | (extra if mode != "ar" else {})
            found.append(params(mode, **own, extra_args={"nld": chosen}))
        return found

    expected = run(llm, prompts, each("ar"))
    before = accepted(llm)
    found = run(llm, prompts, each("self_speculation"))
    names = [name for name, settings in ASKED.items() for _ in range(settings.get("n", 1))]
    wrong = [
        name for name, ours, theirs in zip(names, found, expected, strict=True) if ours.token_ids != theirs.token_ids
    ]
    assert not wrong
    assert accepted(llm) > before
    for name, ours, theirs in zip(names, found, expected, strict=True):
        if name.startswith("logprobs"):
            for own, other in zip(ours.logprobs, theirs.logprobs, strict=True):
                assert own.keys() == other.keys(), name
                assert all(abs(own[token].logprob - other[token].logprob) < 1e-4 for token in own), name


def test_a_seed_s_text_depends_on_no_schedule(llm: Any) -> None:
    """Other block lengths, other neighbors, drafts drawn or not: one text."""
    (prompt,) = random_prompts([11], VOCAB, seed=21)
    neighbors: list[tuple[dict[str, Any], list[list[int]], list[Any]]] = [
        ({}, [], []),
        ({"block_length": 2}, [], []),
        ({"sampled_drafts": False}, [[6, 7]], [params("ar")]),
        ({"mode": "ar"}, [[8] * 20], [params("self_speculation")]),
    ]
    texts = set()
    for own, others, more in neighbors:
        asked = params("", seed=77, extra_args={"nld": {"mode": "self_speculation"} | own})
        texts.add(tuple(run(llm, [prompt, *others], [asked, *more])[0].token_ids))
    assert len(texts) == 1


def exact(model: ReferenceModel, prompt: list[int], place: int, temperature: float) -> torch.Tensor:
    """Return the distribution of the token so many places after the prompt, float64 ``[vocab]``."""
    texts, weights = [prompt], torch.ones(1, dtype=torch.float64)
    for step in range(place + 1):
        probs = torch.stack([model.causal(ids_tensor(model, ids))[0, -1] for ids in texts])
        joint = weights[:, None] * (probs / temperature).double().softmax(-1)
        if step == place:
            return joint.sum(0)
        kept = joint.flatten().nonzero().squeeze(1)
        texts = [[*texts[index // VOCAB], index % VOCAB] for index in kept.tolist()]
        weights = joint.flatten()[kept]
    raise AssertionError


def test_drafts_are_drawn_from_what_the_verifier_is_told(
    llm: Any, model: ReferenceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kept logits are those of the draft pass, and give each draft by the noise of a stream of its own.

    The test of texts below is too coarse to notice; rejection sampling by such logits is tested by itself.
    """
    from vllm_nld.speculator.buffers import OWN_STREAM

    own = runner(llm)
    speculator, states, seen = own.speculator, own.req_states, list[tuple[list[int], torch.Tensor, torch.Tensor]]()
    if speculator.draft_logits is None:
        pytest.skip("this vLLM keeps no draft logits")
    propose = speculator.propose

    def watching(batch: Any, *args: Any, **kwargs: Any) -> Any:
        drafts = propose(batch, *args, **kwargs)
        index = int(batch.idx_mapping_np[0])
        count, length = int(speculator.buffers.valid[index]), int(states.total_len.gpu[index])
        text, kept = states.all_token_ids.gpu[index, :length].tolist(), speculator.draft_logits[index, :count].clone()
        whose = torch.zeros(count, dtype=torch.int64)
        temperature, seeds = (
            tensor[index : index + 1] for tensor in (speculator.buffers.temperature, speculator.buffers.seeds)
        )
        positions = torch.arange(count) + length - 1 + OWN_STREAM
        drawn = second_runner.draw(kept, whose, temperature, seeds, positions, tempered=False, fp64=False)
        assert drawn.equal(drafts[0, :count])
        seen.append((text, kept, drawn))
        return drafts

    monkeypatch.setattr(speculator, "propose", watching)
    (prompt,) = random_prompts([6], VOCAB, seed=2)
    run(llm, [prompt], [params("self_speculation", max_tokens=5, temperature=1.3)])
    assert len(seen) > 1 and any(len(drawn) == 3 for *_, drawn in seen)
    masks = [model.config.mask_token_id] * 3
    for text, kept, drawn in seen:
        cache = KVCache()
        model.causal(ids_tensor(model, text[:-1]), cache)
        expected = model.draft(ids_tensor(model, [text[-1], *masks]), cache)[0, 1 : 1 + len(drawn)]
        assert torch.allclose(kept.softmax(-1), expected.softmax(-1), atol=1e-4)


def test_unseeded_texts_have_ar_s_distribution(llm: Any, model: ReferenceModel) -> None:
    """Verified by vLLM's rejection sampler from what the drafts were drawn from. Places 1 and 2 are drafts'."""
    kept = runner(llm).speculator.draft_logits
    assert (kept is not None) == second_runner.divides_draft_logits()  # without: verified exactly
    (prompt,) = random_prompts([6], VOCAB, seed=2)
    count = 24 * 2
    before = accepted(llm)
    found = run(llm, [prompt], [params("self_speculation", n=count, max_tokens=3, temperature=1.3)])
    assert count / 10 < accepted(llm) - before < 2 * count  # some are, some are not
    for place in (1, 2):
        seen = Counter(output.token_ids[place] for output in found)
        counts = torch.tensor([seen[token] for token in range(VOCAB)])
        expected = exact(model, prompt, place, 1.3).detach() * count
        assert counts[model.config.mask_token_id] == 0
        assert chi_square_p_value(counts, expected) > 1e-3, (place, counts, expected)
