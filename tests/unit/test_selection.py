"""The selection policies, compared with the reference's plain versions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_nld.draft_pass.block import Block, CommitRule
from vllm_nld.draft_pass.selection import select
from vllm_nld.policies import POLICIES, Rows
from vllm_nld.reference.diffusion import Policy, _chosen

MASK, VOCAB = 5, 12
VALUES = {
    "threshold": [0.0, 0.2, 0.5, 0.9, 1.0],
    "tokens_per_step": [None, 1, 3, 20],
    "entropy_budget": [0.0, 0.5, 2.0, 50.0],
}


@st.composite
def rules(draw: Any) -> CommitRule:
    """Any policy that needs only a row of logits, with any values."""
    name = draw(st.sampled_from([name for name, policy in POLICIES.items() if "learned" not in policy.needs]))
    values = {option.name: draw(st.sampled_from(VALUES[option.name])) for option in POLICIES[name].options}
    return CommitRule(name, values, draw(st.sampled_from([None, 1, 2, 5])))


@settings(max_examples=200)
@given(
    st.integers(0, 10_000), st.lists(st.tuples(rules(), st.integers(1, 9), st.integers(0, 4)), min_size=1, max_size=5)
)
def test_rows_follow_their_own_rules(seed: int, rows: list[tuple[CommitRule, int, int]]) -> None:
    generator = torch.Generator().manual_seed(seed)
    longest = max(length for _, length, _ in rows)
    blocks: list[Block] = []
    masked = torch.zeros(len(rows), longest, dtype=torch.bool)
    score, entropy = torch.zeros(len(rows), longest), torch.zeros(len(rows), longest)
    expected: list[list[int]] = []
    for row, (rule, length, passes) in enumerate(rows):
        open_ = torch.rand(length, generator=generator) < 0.7
        open_[int(torch.randint(length, (1,), generator=generator))] = True
        logits = torch.randn(length, VOCAB, generator=generator).mul(3).index_fill(1, torch.tensor(MASK), -torch.inf)
        tokens = logits.argmax(-1)
        block = [MASK if is_open else 7 for is_open in open_.tolist()]
        blocks.append(Block(0, list(block), rule, passes=passes))
        masked[row, :length] = open_
        score[row, :length] = logits.softmax(-1).amax(-1)
        entropy[row, :length] = torch.special.entr(logits.softmax(-1)).sum(-1)
        policy = Policy(rule.policy, **rule.values, max_steps=rule.max_steps)
        expected.append(sorted(_chosen(block, MASK, logits, tokens, policy, passes)))
    committed = select(blocks, masked, score, entropy)
    assert [row.nonzero().flatten().tolist() for row in committed] == expected
    assert (committed & ~masked).sum() == 0
    assert committed.any(1).all(), "every forward commits something"


@pytest.mark.parametrize(
    ("rule", "masked", "passes", "quota"),
    [
        ({"tokens_per_step": 3}, 9, 4, 3),
        ({}, 9, 0, 1),
        ({"max_steps": 4}, 15, 0, 4),
        ({"max_steps": 4}, 11, 1, 4),
        ({"max_steps": 4}, 7, 2, 4),
        ({"max_steps": 4}, 3, 3, 3),
        ({"max_steps": 4}, 3, 9, 3),
    ],
)
def test_quota_is_committed(rule: dict[str, Any], masked: int, passes: int, quota: int) -> None:
    rows = torch.ones(1, masked, dtype=torch.bool)
    given = {"tokens_per_step": rule.get("tokens_per_step")}
    own = Rows(rows, rows.float(), None, None, [given], [passes], [rule.get("max_steps")])
    assert own.quotas().tolist() == [[quota]]


def test_reference_has_every_policy() -> None:
    """The reference is independent on purpose: add a version to ``reference/diffusion.py`` with every new policy."""
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    for name, policy in POLICIES.items():
        values = {option.name: option.default for option in policy.options}
        if "learned" in policy.needs:
            continue  # needs a network; see tests/unit/test_learned_sampler.py
        assert _chosen([MASK] * 3, MASK, logits, logits.argmax(-1), Policy(name, **values), 0)
    with pytest.raises(ValueError, match="the reference has no policy"):
        _chosen([MASK] * 3, MASK, logits, logits.argmax(-1), Policy("another"), 0)


def test_every_policy_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs/user/modes.md").read_text()
    assert not [name for name in POLICIES if f"`{name}`" not in page]


def test_ties_go_left() -> None:
    block = Block(0, [MASK] * 4, CommitRule("top_k", {"tokens_per_step": 2}))
    masked = torch.tensor([[False, True, True, True]])
    assert select([block], masked, torch.full((1, 4), 0.5)).tolist() == [[False, True, True, False]]


def test_block_is_finished_if_no_mask_precedes_its_stop_token() -> None:
    assert Block(0, [1, 2, 3]).is_done(MASK)
    assert not Block(0, [1, MASK, 3]).is_done(MASK)
    assert Block(0, [1, 9, MASK], stop_ids=frozenset({9})).is_done(MASK)
    assert not Block(0, [1, MASK, 9], stop_ids=frozenset({9})).is_done(MASK)
    assert Block(0, [1, 9, MASK, 4], stop_ids=frozenset({9})).decided(MASK) == [1, 9]
    assert Block(0, [1, 4, MASK, 4]).decided(MASK) == [1, 4]
