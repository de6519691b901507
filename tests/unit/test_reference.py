"""The dense model and its three generation methods: exactness, counting, the cache, the thinking budget."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support import models
from vllm_nld.reference import (
    KVCache,
    ReferenceModel,
    RoomyKVCache,
    ar_generate,
    generate,
    linear_spec_generate,
)
from vllm_nld.reference.generate import Generation, draft_block
from vllm_nld.reference.model import attend, attend_folded, folded_mask

PROMPT = [1, 3, 7, 2, 9, 4]
END = 6


@cache
def model_of(seed: int) -> ReferenceModel:
    return models.random_model(models.small_config(), seed)


@cache
def ar_ids(seed: int, prompt: tuple[int, ...], count: int) -> list[int]:
    return ar_generate(model_of(seed), list(prompt), count).ids


@cache
def endless_thinker() -> ReferenceModel:
    """Its head never predicts the end token, because a zero row loses."""
    model = models.random_model(models.small_config(), 5)
    with torch.no_grad():
        model.diffusion_head.weight[END] = 0
    return model


class Counting:
    """Counts a model's forwards."""

    def __init__(self, model: ReferenceModel) -> None:
        self.model, self.config, self.diffusion_head = model, model.config, model.diffusion_head
        self.causal_calls = self.bidirectional_calls = 0

    def causal(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        self.causal_calls += 1
        return self.model.causal(ids, cache)

    def bidirectional(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        self.bidirectional_calls += 1
        return self.model.bidirectional(ids, cache)

    draft = bidirectional


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 24, shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 3),
    prompt=st.lists(st.integers(0, 23), min_size=1, max_size=12),
    block_length=st.sampled_from([4, 8, 16]),
    threshold=st.sampled_from([0.0, 0.5]),
    count=st.integers(1, 28),
)
def test_self_speculation_equals_ar(
    seed: int, prompt: list[int], block_length: int, threshold: float, count: int
) -> None:
    model = model_of(seed)
    expected = ar_generate(model, prompt, count)
    found = linear_spec_generate(model, prompt, count, block_length, threshold=threshold)
    assert found.ids == expected.ids
    assert found.ids[: len(prompt)] == prompt
    assert len(found.ids) == len(prompt) + count


@pytest.mark.parametrize("block_length", [4, 8, 16])
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_self_speculation_past_the_original_context(block_length: int, threshold: float) -> None:
    """The 64 positions of the original context end inside the generated text: the query scale changes there."""
    prompt = tokens(50, seed=3).tolist()
    accepted = 0
    for seed in range(3):
        found = linear_spec_generate(model_of(seed), prompt, 30, block_length, threshold=threshold)
        assert found.ids == ar_ids(seed, tuple(prompt), 30)
        accepted += sum(count - 1 for count in found.accepted)
    assert accepted > 0, "no draft was ever accepted: the comparison exercised nothing"


def test_eos_ends_all_methods() -> None:
    plain = ar_generate(model_of(0), PROMPT, 20).ids[len(PROMPT) :]
    eos = plain[7]
    wanted = PROMPT + plain[: plain.index(eos) + 1]
    assert ar_generate(model_of(0), PROMPT, 20, eos_token_id=eos).ids == wanted
    for block_length in (4, 8, 16):
        assert linear_spec_generate(model_of(0), PROMPT, 20, block_length, eos_token_id=eos).ids == wanted
    diffused = generate(model_of(0), PROMPT, 20, threshold=0.9).ids[len(PROMPT) :]
    ended = generate(model_of(0), PROMPT, 20, threshold=0.9, eos_token_id=diffused[5]).ids[len(PROMPT) :]
    assert ended[-1] == diffused[5]
    assert ended.count(diffused[5]) == 1


def test_ar_counts_generated_tokens() -> None:
    model = Counting(model_of(0))
    result = ar_generate(model, PROMPT, 13)  # type: ignore[arg-type]
    assert result.nfe == 13 == len(result.ids) - len(PROMPT)
    assert (model.causal_calls, model.bidirectional_calls) == (13, 0), "the prefill yields the first token"


@pytest.mark.parametrize("block_length", [4, 8, 16])
def test_self_speculation_counts_single_pass_drafts(block_length: int) -> None:
    result = linear_spec_generate(model_of(1), PROMPT, 30, block_length)
    assert result.nfe == 1 + sum((len(draft) > 1) + 1 for draft in result.drafts)
    assert len(result.drafts) == len(result.accepted)
    assert 1 + sum(result.accepted) == 30
    assert all(1 <= count <= len(draft) for count, draft in zip(result.accepted, result.drafts, strict=True))


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_self_speculation_counts_forwards(threshold: float) -> None:
    model = Counting(model_of(1))
    result = linear_spec_generate(model, PROMPT, 30, 8, threshold=threshold)  # type: ignore[arg-type]
    assert result.nfe == model.causal_calls + model.bidirectional_calls
    assert model.causal_calls == 1 + len(result.drafts)
    if threshold:
        assert model.bidirectional_calls > len(result.drafts), "low confidence must cost more draft forwards"


@pytest.mark.parametrize("threshold", [None, 0.9])
def test_diffusion_length_and_count(threshold: float | None) -> None:
    model = Counting(model_of(2))
    result = generate(model, PROMPT, 20, 8, threshold)  # type: ignore[arg-type]
    assert len(result.ids) == len(PROMPT) + 20
    assert model.causal_calls == 1 + 3, "one prefill and a commit for each block of 8, 8 and 4"
    assert result.nfe == model.bidirectional_calls + 3
    if threshold is None:
        assert model.bidirectional_calls == 7 + 7 + 3, "one mask a step"


def test_threshold_zero_denoises_in_one_forward() -> None:
    result = generate(model_of(2), PROMPT, 16, 8, 0.0)
    assert result.nfe == 2 * 2


def test_cached_causal_equals_one_pass() -> None:
    model, ids = model_of(0), tokens(1, 70)
    with torch.inference_mode():
        full = model.causal(ids)
        cache = KVCache()
        parts = [model.causal(ids[:, :30], cache)]
        parts += [model.causal(ids[:, i : i + 1], cache) for i in range(30, 40)]
        parts.append(model.causal(ids[:, 40:], cache))
    assert cache.length == 70
    torch.testing.assert_close(torch.cat(parts, dim=1), full, atol=2e-4, rtol=1e-4)


def test_causal_rows_do_not_depend_on_the_future() -> None:
    model, ids = model_of(0), tokens(1, 12)
    other = ids.clone()
    other[0, 8:] = (other[0, 8:] + 1) % 24
    torch.testing.assert_close(model.causal(ids)[:, :8], model.causal(other)[:, :8], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model.bidirectional(ids)[:, 0, 6:], model.bidirectional(other)[:, 0, 6:], atol=1e-2)


def test_cropped_cache_drops_tokens() -> None:
    model, ids = model_of(0), tokens(1, 20)
    cache, fresh = KVCache(), KVCache()
    model.causal(ids[:, :15], cache)
    cache.crop(9)
    model.causal(ids[:, :9], fresh)
    torch.testing.assert_close(model.causal(ids[:, 9:], cache), model.causal(ids[:, 9:], fresh), atol=1e-4, rtol=1e-4)


def test_bidirectional_does_not_change_the_cache() -> None:
    model, ids = model_of(0), tokens(1, 20)
    cache = KVCache()
    model.causal(ids[:, :12], cache)
    held = [*cache.keys, *cache.values]
    copies = [tensor.clone() for tensor in held]
    model.bidirectional(ids[:, 12:], cache)
    after = [*cache.keys, *cache.values]
    assert len(after) == len(held) == 4
    assert all(one is other for one, other in zip(after, held, strict=True))
    assert all(torch.equal(one, copy) for one, copy in zip(after, copies, strict=True))


def test_a_cache_with_room_holds_the_same() -> None:
    model, ids = model_of(0), tokens(2, 20)
    plain, roomy = KVCache(), RoomyKVCache(20)
    for start, end in ((0, 9), (9, 10), (10, 20)):
        assert torch.equal(model.causal(ids[:, start:end], plain), model.causal(ids[:, start:end], roomy))
        assert roomy.length == end
        assert torch.equal(model.bidirectional(ids[:, :3], roomy), model.bidirectional(ids[:, :3], plain))
        assert roomy.length == end, "only causal calls write"
        if start == 9:
            room = roomy.keys[1].data_ptr()
    assert all(torch.equal(one, other) for one, other in zip(roomy.values, plain.values, strict=True))
    assert roomy.keys[1].data_ptr() == room, "nothing was copied"


@pytest.mark.parametrize("shape", [(5, 9), (1, 9), (2, 1, 5, 9), None])
def test_heads_of_a_group_attend_as_queries_of_one_head(
    shape: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How CUDA attends, whose result has its tokens before its heads in memory; here on the CPU."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 5, 16, generator=generator)
    key, value = (torch.randn(2, 2, 9, 16, generator=generator) for _ in range(2))
    mask = None
    if shape is not None:
        mask = torch.rand(shape, generator=generator) < 0.5
        mask[..., 0] = True
    expected = attend(query, key, value, mask)
    folded = None if mask is None else folded_mask(mask, 3, query.dtype)
    plain = F.scaled_dot_product_attention

    def as_on_cuda(*args: Any, **kwargs: Any) -> Tensor:
        return plain(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(F, "scaled_dot_product_attention", as_on_cuda)
    torch.testing.assert_close(attend_folded(query, key, value, folded), expected)


def test_only_layer_zero_shares_keys_and_values() -> None:
    """Why a draft's keys and values must not be kept: past layer 0 they depend on the attention pattern."""
    model, ids = model_of(0), tokens(1, 10)
    causal, both = KVCache(), KVCache()
    model.causal(ids, causal)
    model.hidden(ids, torch.arange(10), torch.ones(1, 10, dtype=torch.bool), both, write=True)
    assert torch.equal(causal.keys[0], both.keys[0])
    assert torch.equal(causal.values[0], both.values[0])
    assert not torch.allclose(causal.keys[1], both.keys[1], atol=1e-2)
    assert not torch.allclose(causal.values[1], both.values[1], atol=1e-2)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_mask_token_is_never_emitted(temperature: float) -> None:
    """The head's mask row would win everywhere, so only the explicit rule excludes the token."""
    model = models.random_model(models.small_config(), 4)
    mask_id = model.config.mask_token_id
    with torch.no_grad():
        model.encoder.norm.weight.fill_(1.0)
        model.diffusion_head.weight[mask_id] *= 50
    hidden = model.hidden(tokens(1, 40), torch.arange(40), torch.ones(40, 40, dtype=torch.bool).tril())
    assert (model.diffusion_head(hidden).argmax(-1) == mask_id).any()
    generator = torch.Generator().manual_seed(0)
    results = [ar_generate(model, PROMPT, 24, temperature, generator=generator)]
    for threshold in (0.0, 0.5):
        results.append(
            linear_spec_generate(model, PROMPT, 24, 8, temperature, threshold=threshold, generator=generator)
        )
        results.append(generate(model, PROMPT, 24, 8, threshold, temperature, generator=generator))
    for result in results:
        assert mask_id not in result.ids[len(PROMPT) :]
        assert not any(mask_id in draft for draft in result.drafts)


@pytest.mark.parametrize("limit", [0, 1, 5, 8, 13])
def test_thinking_budget(limit: int) -> None:
    """Each end token was forced."""
    model = endless_thinker()
    free = ar_generate(model, PROMPT, 15).ids[len(PROMPT) :]
    assert END not in free
    budget = {"max_thinking_tokens": limit, "end_think_token_id": END}
    results: dict[str, Generation] = {"ar": ar_generate(model, PROMPT, 15, **budget)}
    for block_length in (4, 8, 16):
        for threshold in (0.0, 0.5):
            found = linear_spec_generate(model, PROMPT, 15, block_length, threshold=threshold, **budget)
            results[f"linear {block_length} {threshold}"] = found
            assert found.ids == results["ar"].ids
        results[f"diffusion {block_length}"] = generate(model, PROMPT, 15, block_length, 0.9, **budget)
    for name, result in results.items():
        text = result.ids[len(PROMPT) :]
        assert [i for i, token in enumerate(text) if token == END] == [limit], name
        assert len(text) == 15, name
    assert results["ar"].ids[len(PROMPT) :][:limit] == free[:limit]


def test_threshold_drafts_take_at_most_one_forward_per_token() -> None:
    model, cache = model_of(0), KVCache()
    model.causal(torch.tensor([PROMPT]), cache)
    for threshold, least, most in ((0.0, 1, 1), (0.5, 1, 7), (1.0, 7, 7)):
        block, forwards = draft_block(model, cache, 3, 8, threshold)
        assert least <= forwards <= most
        assert block[0] == 3
        assert len(block) == 8
    assert draft_block(model, cache, 3, 1) == ([3], 0)


class Scripted:
    """A stand-in model that always drafts ``canvas`` and whose causal rows always predict ``causal``."""

    def __init__(self, canvas: list[int], predictions: list[int]) -> None:
        self.config = SimpleNamespace(mask_token_id=10, eos_token_id=None, block_size=4)
        self.diffusion_head = torch.nn.Linear(1, 1)
        self.canvas, self.predictions, self.prefilled = canvas, predictions, False

    @staticmethod
    def _logits(answers: list[int], rows: int) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor([answers[:rows]]), 11).float()

    def causal(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        first, self.prefilled = not self.prefilled, True
        return self._logits(self.canvas[:1] if first else self.predictions, ids.shape[1])

    def draft(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        return self._logits(self.canvas, ids.shape[1])


@pytest.mark.parametrize(
    ("canvas", "length", "predictions", "count", "seed"),
    [
        ([7, 9, 2, 3], 4, [8, 2, 3, 0], 1, 8),
        ([5, 6, 7, 8], 4, [6, 7, 8, 9], 4, 9),
        ([8, 3, 4, 5], 2, [3, 4, 5, 6], 2, 4),
    ],
)
def test_acceptance_vector_is_reproduced(
    canvas: list[int], length: int, predictions: list[int], count: int, seed: int
) -> None:
    """The seed and the matched drafts are decided; the first causal token after them seeds the next block."""
    model = Scripted(canvas, predictions)
    result = linear_spec_generate(model, [0], 1 + length, 4)  # type: ignore[arg-type]
    assert result.drafts[0] == canvas[:length]
    assert result.accepted[0] == count
    assert result.ids[1 : 1 + count] == canvas[:count]
    assert result.ids[1 + count] == seed
    if count < length:
        assert result.drafts[1][0] == seed
