"""Engines with each implementation of the operators that this machine can run, and the causal steps that use them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.cpus import needs_float8_cache, vllm_writes_tiles, write_tiles
from tests.support.engines import accepted, counters, engine, generate, random_prompts
from tests.support.models import random_model, save, small_config
from vllm_nld import ops
from vllm_nld.attention import backend
from vllm_nld.errors import NLDError
from vllm_nld.ops.pages import STRIDED, TILED
from vllm_nld.reference import ReferenceModel, ar_generate
from vllm_nld.reference import generate as reference_generate

CPU = torch.device("cpu")
PROMPTS = random_prompts([1, 17, 64, 130, 33], 24, seed=3)


@pytest.fixture
def fresh_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """An implementation is chosen once per process. Choose again before and after the test."""
    caches = ops.implementation, ops.function, backend.fast_causal
    for cached in caches:
        cached.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for cached in caches:
        cached.cache_clear()


@pytest.fixture(scope="module")
def model() -> ReferenceModel:
    return random_model(small_config(vocab_size=24, block_size=8, eos_token_id=None), 0)


@pytest.fixture(scope="module")
def folder(model: ReferenceModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(model, tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", [one.name for one in ops.IMPLEMENTATIONS if "cpu" in one.devices])
def test_texts_equal_the_reference(
    name: str, model: ReferenceModel, folder: Path, fresh_choice: pytest.MonkeyPatch
) -> None:
    fresh_choice.setenv(ops.ENVIRONMENT_VARIABLE, name)
    try:
        assert ops.implementation("block_attention", "cpu").name == name
    except NLDError as error:
        pytest.skip(str(error))
    with engine(folder, spec=True) as llm:
        expected = [ar_generate(model, ids, 24).ids[len(ids) :] for ids in PROMPTS]
        assert generate(llm, PROMPTS) == expected
        assert counters(llm)["draft_forwards"] > 0
        denoised = [reference_generate(model, ids, 24, threshold=0.3).ids[len(ids) :] for ids in PROMPTS]
        nld = {"mode": "diffusion", "threshold": 0.3}
        assert generate(llm, PROMPTS, extra_args={"nld": nld}) == denoised


def test_unknown_implementation_is_refused(fresh_choice: pytest.MonkeyPatch) -> None:
    fresh_choice.setenv(ops.ENVIRONMENT_VARIABLE, "fortran")
    names = ", ".join(one.name for one in ops.IMPLEMENTATIONS)
    with pytest.raises(NLDError, match=f"VLLM_NLD_OPS=fortran: allowed are {names}$"):
        ops.implementation("block_attention", "cpu")


def test_implementation_for_another_device_is_refused(fresh_choice: pytest.MonkeyPatch) -> None:
    fresh_choice.setenv(ops.ENVIRONMENT_VARIABLE, "cuda")
    with pytest.raises(NLDError, match="VLLM_NLD_OPS=cuda does not run on cpu: it serves cuda, not cpu"):
        ops.implementation("block_attention", "cpu")


def test_causal_steps_agree_with_vllms_attention(folder: Path, fresh_choice: pytest.MonkeyPatch) -> None:
    """In bfloat16 a prefill runs the operator under its causal mask, or vLLM's attention: equal probabilities.

    The CPU decides which of them is used (``tests/unit/test_causal_choice.py``); here both are forced, on any CPU.
    """
    fresh_choice.setattr(backend, "has_strided_pages", lambda _: True)
    found = []
    calls: list[int] = []
    original = backend.verify_blocks

    def counted(*arguments: Any) -> Any:
        blocks = original(*arguments)
        calls.append(blocks is not None)
        return blocks

    fresh_choice.setattr(backend, "verify_blocks", counted)
    for fast in (True, False):
        fresh_choice.setattr(backend, "fast_causal", lambda *_, fast=fast: fast)
        calls.clear()
        with engine(folder, dtype="bfloat16", max_num_batched_tokens=48) as llm:
            found.append(prompt_logprobs(llm))
        assert any(calls) == fast
    torch.testing.assert_close(found[0], found[1], atol=0.08, rtol=0)


def test_ar_works_with_unknown_page_layout(folder: Path, fresh_choice: pytest.MonkeyPatch) -> None:
    """With an unknown layout, causal steps must use vLLM's attention, and AR must work."""

    def unknown(_: Any) -> Any:
        raise NLDError("unknown layout")

    fresh_choice.setattr(backend, "fast_causal", lambda *_: True)
    fresh_choice.setattr(backend, "find_layout", unknown)
    with engine(folder, dtype="bfloat16") as llm:
        assert all(len(tokens) == 24 for tokens in generate(llm, PROMPTS))


def test_pages_in_tiles_change_nothing(tmp_path: Path, fresh_choice: pytest.MonkeyPatch) -> None:
    """With AMX, vLLM writes pages in tiles. Every step runs the operator here, once over each kind of page: equal bits.

    vLLM's attention over tiles needs AMX, so the causal steps that would use it run the operator here. Writing tiles
    needs AVX-512; without it, the test writes them.
    """
    from vllm.v1.attention.backends import cpu_attn

    folder = save(random_model(small_config(block_size=8), 1), tmp_path)
    original, layouts = backend.verify_blocks, []

    def every_step(metadata: Any, query: torch.Tensor, layer: Any) -> Any:
        if metadata is not None:
            metadata.max_query_len = max(2, metadata.max_query_len)
            layouts.append(backend.page_layout(layer))
        return original(metadata, query, layer)

    fresh_choice.setattr(backend, "verify_blocks", every_step)
    fresh_choice.setattr(backend, "fast_causal", lambda *_: True)
    fresh_choice.setattr(backend, "has_strided_pages", lambda _: True)
    found = []
    for layout in (STRIDED[0], TILED):
        isa = "amx" if layout is TILED and vllm_writes_tiles() else "vec"
        fresh_choice.setattr(cpu_attn, "_get_attn_isa", lambda *_, isa=isa: isa)
        if layout is TILED and isa == "vec":
            by_hand = lambda _, layer, *arguments: write_tiles(*arguments)  # noqa: E731
            fresh_choice.setattr(cpu_attn.CPUAttentionBackendImpl, "do_kv_cache_update", by_hand)
        layouts.clear()
        with engine(folder, spec=True, dtype="bfloat16", enable_prefix_caching=True) as llm:
            nld = {"mode": "diffusion", "threshold": 0.3}
            found.append([generate(llm, PROMPTS), generate(llm, PROMPTS, extra_args={"nld": nld})])
            assert counters(llm)["draft_forwards"] > 0
        assert layouts, "no causal step ran the operator"
        assert all(one is layout for one in layouts)
    assert found[0] == found[1]


def prompt_logprobs(llm: Any) -> torch.Tensor:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS[1:]], params, use_tqdm=False)
    return torch.tensor([next(iter(at.values())).logprob for out in outputs for at in out.prompt_logprobs[1:]])


@needs_float8_cache
@pytest.mark.parametrize("cache", ["fp8", "fp8_e5m2"])
def test_float8_cache_stays_lossless(cache: str, folder: Path) -> None:
    """AR and verify passes read the same quantized cache, so their texts are equal; drafts also read it."""
    settings: dict[str, Any] = {"kv_cache_dtype": cache, "dtype": "float32"}
    with engine(folder, **settings) as llm:
        expected = generate(llm, PROMPTS)
    with engine(folder, spec=True, **settings) as llm:
        assert generate(llm, PROMPTS) == expected
        assert counters(llm)["draft_forwards"] > 0
        assert accepted(llm) > 0
