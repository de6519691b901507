"""The head split over ranks gives the token of one rank's argmax, also with ties, and its probability."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from vllm_nld.draft_pass.block import Block, CommitRule
from vllm_nld.draft_pass.selection import needs_logits
from vllm_nld.draft_pass.token_choice import TokenChoice
from vllm_nld.model.best_tokens import best_of, combine, shard_summary


def split(logits: Tensor, columns: int, shards: int) -> Tensor:
    """Summaries of shards with this many columns; the last ones may have fewer, or none."""
    starts = [min(shard * columns, logits.shape[1]) for shard in range(shards)]
    return torch.stack([shard_summary(logits[:, start : start + columns], start) for start in starts])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab", "columns", "shards"), [(1000, 500, 2), (24, 32, 2), (1000, 256, 4), (130, 64, 4)])
def test_combined_shards_equal_the_whole(dtype: torch.dtype, vocab: int, columns: int, shards: int) -> None:
    """In bfloat16 many logits are equal; (24, 32, 2) and (130, 64, 4) have shards with only padding."""
    logits = (torch.randn(256, vocab, generator=torch.Generator().manual_seed(vocab)) * 3).to(dtype)
    logits[:, 5] = -torch.inf  # the mask token
    found, whole = combine(split(logits, columns, shards)), best_of(logits)
    assert torch.equal(found.tokens, logits.float().argmax(-1))
    assert torch.equal(found.tokens, whole.tokens)
    torch.testing.assert_close(found.probability, logits.float().softmax(-1).amax(-1))
    torch.testing.assert_close(found.probability, whole.probability)


def test_lowest_id_wins_among_equal_logits() -> None:
    logits = torch.zeros(3, 12)
    logits[1, [3, 7, 11]] = 2.0
    logits[2, :5] = -torch.inf
    assert combine(split(logits, 4, 3)).tokens.tolist() == [0, 3, 5]
    assert best_of(logits).tokens.tolist() == [0, 3, 5]


def test_ids_of_large_vocabularies_are_exact() -> None:
    logits = torch.zeros(2, 4)
    logits[0, 3] = logits[1, 1] = 1.0
    assert combine(shard_summary(logits, (1 << 24) - 4)[None]).tokens.tolist() == [(1 << 24) - 1, (1 << 24) - 3]


def test_requests_that_need_all_logits() -> None:
    def block(**settings: object) -> Block:
        return Block(0, [1, 2], **settings)  # type: ignore[arg-type]

    assert not needs_logits(block())
    assert not needs_logits(block(rule=CommitRule("top_k", {"tokens_per_step": None})))
    assert needs_logits(block(choice=TokenChoice(vocab_size=8)))
    assert needs_logits(block(rule=CommitRule("learned", {"threshold": 0.9})))
    assert needs_logits(block(rule=CommitRule("entropy_budget", {"entropy_budget": 0.3})))


@pytest.mark.parametrize("first", [None, 0, 12])
def test_tokens_that_are_never_emitted_are_barred_in_every_shard(first: int | None) -> None:
    """The mask token, and the unused one that the vision-language model's vocabulary ends with."""
    from vllm_nld.model.network import NLDForCausalLM

    whole = torch.ones(2, 24)
    start = first or 0
    model = NLDForCausalLM.__new__(NLDForCausalLM)
    torch.nn.Module.__init__(model)
    model.never_emitted = (5, 23)
    shard = SimpleNamespace(org_vocab_start_index=start, org_vocab_end_index=start + 12)
    model.lm_head = SimpleNamespace(tp_size=1 if first is None else 2, shard_indices=shard)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm.model_executor.models.llama.LlamaForCausalLM.compute_logits", lambda *_: whole.clone())
        patch.setattr("vllm_nld.model.network.layers.ungathered_logits", lambda *_: whole[:, start:].clone())
        logits, found = model.shard_logits(torch.zeros(2, 4))
    barred = (logits[0] == -torch.inf).nonzero().flatten().tolist()
    assert found == first
    assert barred == {None: [5, 23], 0: [5], 12: [11]}[first]
