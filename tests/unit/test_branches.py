"""Self-speculation with branches on the dense model: the text stays AR's, and a hit saves a forward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import models
from tests.support.chi_square import chi_square_p_value
from vllm_nld.branches.places import Branch, Draft, every_place, likeliest_places, no_branches
from vllm_nld.reference import ar_generate, linear_spec_generate
from vllm_nld.reference.adapter import DraftAdapter
from vllm_nld.reference.branches import branch_spec_generate, quadratic_spec_generate, verify
from vllm_nld.reference.model import KVCache, ReferenceModel

PROMPT = [1, 3, 7, 2, 9, 4]
CHOICES = {
    "none": no_branches,
    "every place": every_place(6),
    "two": likeliest_places(2, 4),
    "six, no masks": likeliest_places(6, 8, mask_worth=0),
}


def model_of(seed: int, adapter: bool = False) -> ReferenceModel:
    model = models.random_model(models.small_config(), seed)
    if adapter:
        generator = torch.Generator().manual_seed(seed)
        row = model.encoder.embed_tokens.weight[0]
        model.draft_adapter = DraftAdapter.fresh(model.config, 4, 8.0, generator, ("q_proj", "o_proj"), row)
        for b in model.draft_adapter.b.values():
            b.normal_(generator=generator)
    return model


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 3),
    prompt=st.lists(st.integers(0, 23), min_size=1, max_size=8),
    block_length=st.sampled_from([2, 4, 8]),
    choice=st.sampled_from(sorted(CHOICES)),
    count=st.integers(1, 16),
    adapter=st.booleans(),
    bootstrap=st.booleans(),
    misses_draft=st.booleans(),
)
def test_text_is_that_of_ar(
    seed: int, prompt: list[int], block_length: int, choice: str, count: int, adapter: bool, bootstrap: bool,
    misses_draft: bool,
) -> None:  # fmt: skip
    model = model_of(seed, adapter)
    how = {"bootstrap": bootstrap, "misses_draft": misses_draft}
    found = branch_spec_generate(model, prompt, CHOICES[choice], count, block_length, **how)
    assert found.ids == ar_generate(model, prompt, count).ids
    assert quadratic_spec_generate(model, prompt, count, block_length).ids == found.ids


def test_without_branches_it_is_linear_self_speculation() -> None:
    for seed in range(3):
        expected = linear_spec_generate(model_of(seed), PROMPT, 30, 8)
        found = branch_spec_generate(model_of(seed), PROMPT, no_branches, 30, 8, look_past=False)
        assert (found.ids, found.nfe, found.drafts) == (expected.ids, expected.nfe, expected.drafts)
        assert set(found.hits) == {"none"}


def test_quadratic_takes_one_forward_a_cycle() -> None:
    found = quadratic_spec_generate(model_of(1), PROMPT, 30, 8)
    assert found.nfe == 1 + len(found.drafts)
    assert found.query_tokens[0] == 8 + 8 * 8  # B rows, and a branch of B tokens after each: B (B + 1) together


def test_a_prompt_of_one_token_is_no_cycle() -> None:
    found = branch_spec_generate(model_of(1), PROMPT[:1], no_branches, 10, 8)
    assert len(found.accepted) == len(found.hits) == len(found.drafts)


def test_misses_that_do_not_draft_take_one_forward_a_cycle() -> None:
    """After the prompt and after every miss comes a forward of one token, whose branch is hit."""
    found = branch_spec_generate(model_of(1), PROMPT, likeliest_places(3, 4), 40, 8, misses_draft=False)
    assert found.nfe == 1 + len(found.drafts)
    assert len(found.drafts[0]) == 1
    followed = [len(own) for own, hit in zip(found.drafts[1:], found.hits, strict=False) if hit == "none"]
    assert followed and set(followed) == {1}
    singles = [hit for own, hit in zip(found.drafts, found.hits, strict=True) if len(own) == 1]
    assert set(singles[:-1]) == {"mask"}


@pytest.mark.parametrize("seed", range(3))
def test_a_hit_drafts_what_a_draft_forward_would(seed: int) -> None:
    """A branch with the right guess gives the next block that a separate draft forward gives, adapter and all."""
    model = model_of(seed, adapter=True)
    cache, block = KVCache(), [5, 8, 11, 2]
    model.causal(torch.tensor([PROMPT]), cache)
    branches = [Branch(1, 9, 4), Branch(3, 7, 3), Branch(1, None, 4)]
    rows, drafted, tokens = verify(model, cache, block, branches, [4, 3, 4])
    assert cache.length == len(PROMPT) + 4
    assert tokens == 4 + 11
    mask = model.config.mask_token_id
    for branch, own in zip(branches, drafted, strict=True):
        prefix = KVCache()
        model.causal(torch.tensor([PROMPT + block[: branch.after + 1]]), prefix)
        seed_token = mask if branch.guess is None else branch.guess
        alone = model.draft(torch.tensor([[seed_token] + [mask] * (branch.length - 1)]), prefix)[0]
        torch.testing.assert_close(own, alone, rtol=1e-4, atol=1e-4)
    plain = KVCache()
    expected = model.causal(torch.tensor([PROMPT + block]), plain)[0, len(PROMPT) :]
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-4)


def test_likeliest_places_take_the_best_gains() -> None:
    chances = [[1.0, 0, 0, 0], [0.9, 0.1, 0, 0], [0.2, 0.5, 0.3, 0], [0.8, 0.1, 0.1, 0]]
    likely = torch.arange(16).view(4, 4).tolist()
    draft = Draft([0, 4, 8], likely, chances)
    assert draft.ends() == pytest.approx([0.1, 0.72, 0.18])
    two = likeliest_places(2, 4, mask_worth=0.5, by_rank=(0.45, 0.17))(draft, 20)
    # A mask after the second token is worth 0.72 * 0.5. Next comes the best guess there, whose gain is halved by that
    # mask (0.162), or the guess after the whole block (0.18 * 0.8 = 0.144).
    assert two == [Branch(1, None, 4), Branch(1, 9, 4)]
    assert likeliest_places(1, 4, mask_worth=0)(draft, 20) == [Branch(1, 9, 4)]
    short = likeliest_places(9, 8)(draft, 4)
    assert {(branch.after, branch.length) for branch in short} == {(0, 3), (1, 2)}, "no branch passes the text's end"


def test_the_ensemble_changes_the_text_and_nothing_else_does() -> None:
    texts = [quadratic_spec_generate(model_of(2), PROMPT, 40, 8, weight).ids for weight in (1.0, 0.5, 0.0)]
    assert texts[0] == ar_generate(model_of(2), PROMPT, 40).ids
    assert texts[1] != texts[0]
    assert model_of(2).config.mask_token_id not in texts[2][len(PROMPT) :]


def test_eos_and_thinking_budget() -> None:
    plain = ar_generate(model_of(0), PROMPT, 20).ids
    eos = plain[len(PROMPT) + 7]
    expected = ar_generate(model_of(0), PROMPT, 20, eos_token_id=eos, max_thinking_tokens=5, end_think_token_id=6)
    for choice in CHOICES.values():
        found = branch_spec_generate(
            model_of(0), PROMPT, choice, 20, 4, eos_token_id=eos, max_thinking_tokens=5, end_think_token_id=6
        )
        assert found.ids == expected.ids


def test_sampled_text_has_the_distribution_of_ar() -> None:
    """The third token's distribution, whatever came before, against AR's exact one, by chi-square."""
    model, runs = model_of(1, adapter=True), 250
    vocabulary = model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(vocabulary)
    for _ in range(runs):
        found = branch_spec_generate(
            model, PROMPT, likeliest_places(3, 3), 3, 3, temperature=1.0, generator=generator, bootstrap=True
        )
        counts[found.ids[-1]] += 1
    pairs = torch.cartesian_prod(torch.arange(vocabulary), torch.arange(vocabulary))
    texts = torch.cat((torch.tensor(PROMPT).expand(len(pairs), -1), pairs), dim=1)
    with torch.inference_mode():
        chances = model.causal(texts)[:, -3:].softmax(-1)
    before = chances[:, 0].gather(1, pairs[:, :1]) * chances[:, 1].gather(1, pairs[:, 1:])
    expected = runs * (before * chances[:, 2]).sum(0)
    assert chi_square_p_value(counts, expected) > 0.001


def test_guessed_drafts_save_forwards() -> None:
    nfe = {}
    for name, choice in CHOICES.items():
        results = [branch_spec_generate(model_of(seed), PROMPT, choice, 20, 4) for seed in range(2)]
        nfe[name] = sum(result.nfe for result in results)
        saved = sum(hit != "none" for result in results for hit in result.hits)
        assert (saved > 0) == (name != "none")
    assert nfe["every place"] < nfe["none"]
