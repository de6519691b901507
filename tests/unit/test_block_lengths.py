"""The length of a request's next block, and when there is none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_nld.draft_pass.block import Block
from vllm_nld.draft_pass.forward import DraftPass
from vllm_nld.draft_pass.token_choice import DraftChoice
from vllm_nld.draft_sources.acceptance import Prior
from vllm_nld.options import NLDOptions
from vllm_nld.proposer.blocks import Sizes, diffusion_block, draft_block
from vllm_nld.proposer.causal_step import CausalStep
from vllm_nld.proposer.request_state import RequestState
from vllm_nld.proposer.thinking import ThinkingBudget

MASK = 99


def no_sampler(*_: Any) -> Any:
    raise AssertionError("nothing is drawn here")


def state(
    generated: list[int], thinking: ThinkingBudget | None = None, options: dict[str, Any] | None = None, **params: Any
) -> RequestState:
    """A request without an engine; its prompt is 1, 2, 3."""
    settings: dict[str, Any] = {
        "max_tokens": None, "min_tokens": 0, "temperature": 0.0, "seed": None, "logprobs": None, "ignore_eos": False,
        "structured_outputs": None, "eos_token_id": None, "stop_token_ids": [], "all_stop_token_ids": set(),
        "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "allowed_token_ids": None,
        "top_k": 0, "top_p": 1.0,
    }  # fmt: skip
    cached = SimpleNamespace(
        prompt_token_ids=[1, 2, 3],
        output_token_ids=generated,
        sampling_params=SimpleNamespace(**(settings | params)),
        num_computed_tokens=3 + len(generated) - 1,
        num_prompt_tokens=3,
    )
    return RequestState("r", cached, NLDOptions.parse(options or {}), Prior(), no_sampler, thinking)


@pytest.mark.parametrize(
    ("generated", "params", "length"),
    [
        (5, {}, 8),
        (5, {"max_tokens": 20}, 8),
        (5, {"max_tokens": 9}, 4),
        (5, {"max_tokens": 6}, 1),
        (5, {"max_tokens": 20, "min_tokens": 8}, 3),
        (8, {"max_tokens": 20, "min_tokens": 8}, 8),
    ],
)
def test_cycle_ends_at_max_tokens_and_min_tokens(generated: int, params: dict[str, int], length: int) -> None:
    assert state([7] * generated, **params).longest_draft_block(8) == length


def test_cycle_ends_with_the_thinking_budget() -> None:
    budget = ThinkingBudget(limit=5, start_tokens=[3], end_tokens=[13])
    assert state([7, 7], budget).longest_draft_block(8) == 3, "3 thinking tokens may follow, the forced one by itself"
    assert state([7] * 5, budget).longest_draft_block(8) == 1
    assert state([7, 13, 7], budget).longest_draft_block(8) == 8, "thinking is over"
    assert state([7, 7]).longest_draft_block(8) == 8


@pytest.mark.parametrize(
    ("start", "text", "drafts", "kept"),
    [
        ([3], [3, 9, 13], [7, 7, 3, 8], [7, 7]),
        ([3], [3], [7, 7], [7, 7]),
        ([3, 4], [7, 3], [4, 8], []),
        ([3, 4], [7, 7], [4, 3, 8, 3, 4, 9], [4, 3, 8, 3]),
        ([3, 4], [3], [4, 8], []),
        ([], [3], [4, 8], [4, 8]),
    ],
)
def test_drafts_open_no_thinking_section(start: list[int], text: list[int], drafts: list[int], kept: list[int]) -> None:
    budget = ThinkingBudget(limit=5, start_tokens=start, end_tokens=[13])
    assert budget.before_start(np.array(text), drafts) == kept


@pytest.mark.parametrize("start", [[3], [6, 3]])
def test_cutting_drawn_drafts_before_a_start_changes_no_distribution(start: list[int]) -> None:
    """The exact distribution of the next token, over all draws: the causal pass decides the position of a cut draft."""
    vocab = 8
    draft, target = torch.randn(2, vocab, generator=torch.Generator().manual_seed(4))
    draft[3] = target[3] = 2.0  # the token that would open the section is likely
    made = state([7, 6], ThinkingBudget(50, start, [13]), temperature=1.0)
    block = draft_block(made, Sizes(2, vocab, MASK, 100), 6, 4, 2)
    assert isinstance(block.choice, DraftChoice)
    block.choice.choose(draft[None], [1], [])
    assert block.choice.probs is not None
    q, p = block.choice.probs[0].double(), target.double().softmax(-1)
    rest = (p - q).clamp_min(0)
    found = torch.zeros(vocab, dtype=torch.float64)
    for token in range(vocab):
        if not made.thinking.before_start(np.array([7, 6]), [token]):  # type: ignore[union-attr]
            found += q[token] * p
        elif q[token] > 0:
            accepted = min(1.0, float(p[token] / q[token]))
            found[token] += q[token] * accepted
            found += q[token] * (1 - accepted) * rest / rest.sum()
    torch.testing.assert_close(found, p, atol=1e-6, rtol=0)


def diffusion(made: RequestState, room: int = 100) -> Block | None:
    return diffusion_block(made, Sizes(8, 24, MASK, 11 + room), made.cached.output_token_ids[-1], 10)


@pytest.mark.parametrize(
    ("options", "params", "room", "tokens"),
    [
        ({}, {}, 100, [6] + [MASK] * 7),
        ({"block_length": 4}, {}, 100, [6] + [MASK] * 3),
        ({}, {"max_tokens": 4}, 100, [6] + [MASK] * 2),
        ({}, {"max_tokens": 3}, 100, [6, MASK]),
        ({}, {"max_tokens": 2}, 100, None),
        ({}, {}, 3, [6] + [MASK] * 2),
        ({}, {}, 1, None),
        ({"seed_first": False}, {"max_tokens": 2}, 100, [MASK]),
        ({"seed_first": False}, {}, 100, [MASK] * 8),
    ],
)
def test_length_of_a_diffusion_block(
    options: dict[str, Any], params: dict[str, int], room: int, tokens: list[int] | None
) -> None:
    block = diffusion(state([5, 6], options={"mode": "diffusion", **options}, **params), room)
    assert (block and block.tokens) == tokens


def test_diffusion_block_contains_the_end_of_thinking() -> None:
    budget = ThinkingBudget(limit=5, start_tokens=[3], end_tokens=[13, 14])
    block = diffusion(state([7, 6], budget, {"mode": "diffusion"}))
    assert block is not None
    assert block.tokens == [6, MASK, MASK, MASK, 13, 14, MASK, MASK]
    unseeded = diffusion(state([7, 6], budget, {"mode": "diffusion", "seed_first": False}))
    assert unseeded is not None
    assert unseeded.tokens == [MASK, MASK, MASK, MASK, 13, 14, MASK, MASK]


def test_stop_token_ends_a_request() -> None:
    assert state([5], eos_token_id=2).is_over([4, 2])
    assert not state([5], eos_token_id=2, ignore_eos=True).is_over([4, 2])
    assert state([5], stop_token_ids=[9], ignore_eos=True).is_over([9])
    unseeded = state([5], options={"mode": "diffusion", "seed_first": False}, eos_token_id=2)
    assert not unseeded.is_over([4, 2]), "the last token is yet to be replaced"
    assert unseeded.is_over([2, 4])


def test_prefill_is_distinguished_from_decoding() -> None:
    made = state([7, 7])
    assert not CausalStep({"r": 1}).is_prefill(made)
    assert not CausalStep({"r": 8}, {"r": [1] * 7}).is_prefill(made)
    assert CausalStep({"r": 8}).is_prefill(made), "a resumption"
    made.cached.num_computed_tokens = 2
    assert CausalStep({"r": 1}).is_prefill(made), "the last token of a prompt"


def test_groups_fit_into_a_forward() -> None:
    drafts: DraftPass = object.__new__(DraftPass)
    drafts.max_tokens = 24
    blocks = [Block(10, [0] * length) for length in (8, 8, 8, 20, 5, 24, 3)]
    assert [[block.length for block in group] for group in drafts._groups(blocks)] == [[8, 8, 8], [20], [5], [24], [3]]
