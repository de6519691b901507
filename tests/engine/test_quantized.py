"""Quantized weights in every mode, one tiny checkpoint per scheme, packed here by compressed-tensors.

What a machine cannot run is skipped by the name of the instruction set that vLLM's kernel needs, and there refused in
one line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.linear import LinearBase
from vllm.platforms import current_platform

from tests.support.adapters import random_adapter
from tests.support.cpus import has_amx
from tests.support.engines import NEAR_TIE, accepted, engine, far_from_best, generate, random_prompts, runner
from tests.support.models import random_model, save, small_config
from tests.support.quantized import compress
from vllm_nld.checkpoints.draft_lora import FOLDER, TARGETS
from vllm_nld.draft_pass.learned_sampler import LearnedSampler, LearnedSamplerConfig
from vllm_nld.errors import NLDError

CONFIG = small_config(eos_token_id=None, hidden_size=128, intermediate_size=256, head_dim=64)
PROMPTS = random_prompts([3, 40, 90], 24)
TOKENS = 24


def has_int4_product() -> bool:
    """Whether vLLM's operators for this CPU can multiply by packed int4 weights."""
    current_platform.import_kernels()
    return hasattr(torch.ops._C, "cpu_gemm_wna16")


needs_int4 = pytest.mark.skipif(not has_int4_product(), reason="vLLM's int4 product for CPUs needs AVX-512")
needs_amx = pytest.mark.skipif(not has_amx(), reason="vLLM's float8 product with blocks needs AMX")

EXACT = [
    "W8A8",
    "W4A8",
    pytest.param("W4A16", marks=needs_int4),
    pytest.param("W4A16_ASYM", marks=needs_int4),
]
"""A row's result does not depend on how many rows are multiplied together."""
NEARLY = ["FP8_DYNAMIC", pytest.param("FP8_BLOCK", marks=needs_amx)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a draft adapter on every target, and a learned sampler."""
    folder = save(random_model(CONFIG, seed=3), tmp_path_factory.mktemp("model") / "plain")
    random_adapter(CONFIG, targets=TARGETS, mask_row=True, size=0.15).write(folder / FOLDER, "somewhere")
    torch.manual_seed(0)
    sizes = LearnedSamplerConfig(vocab_size=CONFIG.vocab_size, token_dims=8, d_model=16, layers=1, heads=2)
    LearnedSampler(sizes).eval().save(folder / "learned_sampler")
    return folder


def texts(llm: Any, options: dict[str, Any], together: bool) -> list[list[int]]:
    batches = [PROMPTS] if together else [[ids] for ids in PROMPTS]
    return [text for batch in batches for text in generate(llm, batch, [options] * len(batch), max_tokens=TOKENS)]


def row_difference(llm: Any) -> float:
    """The largest change of a row of a linear layer when it is multiplied with fewer rows at once."""
    layer = runner(llm).model.model.layers[0]
    rows = torch.randn(32, CONFIG.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    worst = 0.0
    with torch.inference_mode():
        for linear in (layer.self_attn.qkv_proj, layer.mlp.gate_up_proj):
            whole = linear(rows)[0].float()
            few = [linear(rows[:count].clone())[0].float() - whole[:count] for count in (1, 2, 4, 8, 9, 16)]
            worst = max([worst, *(float(x.abs().max()) for x in few)])
    return worst


@pytest.mark.parametrize("scheme", EXACT)
def test_integer_kernels_give_ar_s_text_in_every_mode(scheme: str, plain: Path, tmp_path: Path) -> None:
    with engine(compress(plain, tmp_path / scheme, scheme), spec=True, dtype="bfloat16", max_num_seqs=4) as llm:
        assert row_difference(llm) == 0
        # One at a time: in bfloat16 the head's rounding may depend on the number of rows.
        expected = texts(llm, {"mode": "ar"}, together=False)
        assert texts(llm, {"mode": "self_speculation"}, together=True) == expected
        assert accepted(llm) > 0
        assert texts(llm, {"mode": "self_speculation", "draft_adapter": False}, together=True) == expected
        assert texts(llm, {"mode": "auto"}, together=True) == expected
        for options in ({"threshold": 0.4}, {"sampler": "learned", "threshold": 0.5}):
            diffusion = {"mode": "diffusion"} | options
            assert texts(llm, diffusion, together=True) == texts(llm, diffusion, together=False)


@pytest.mark.parametrize("scheme", NEARLY)
def test_float8_kernels_leave_ar_s_text_at_near_ties_only(scheme: str, plain: Path, tmp_path: Path) -> None:
    """vLLM's AMX kernel with blocks takes another path for four rows and fewer: AR steps and verify passes differ."""
    with engine(compress(plain, tmp_path / scheme, scheme), spec=True, dtype="bfloat16", max_num_seqs=4) as llm:
        for options in ({}, {"draft_adapter": False}):
            found = texts(llm, {"mode": "self_speculation"} | options, together=True)
            assert max(map(far_from_best, [llm] * 3, PROMPTS, found)) < NEAR_TIE
        assert accepted(llm) > 0
        assert [len(text) for text in texts(llm, {"mode": "diffusion", "threshold": 0.4}, together=True)] == [
            TOKENS
        ] * 3


def sum_in_halves(method: Any) -> None:
    """Have a layer of four rows and fewer sum its inputs in two halves, each rounded, as a split-K kernel does."""
    whole = method.apply

    def apply(layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if len(x) > 4:
            return whole(layer, x, bias)
        first = x.clone()
        first[:, x.shape[1] // 2 :] = 0
        return whole(layer, first, bias) + whole(layer, x - first, None)

    method.apply = apply


def test_a_kernel_that_depends_on_rows_leaves_ar_s_text_at_near_ties_only(plain: Path) -> None:
    """AR steps have one row, verify passes sixteen: with such a kernel they round differently, and may disagree."""
    with engine(plain, spec=True, dtype="bfloat16", max_num_seqs=4) as llm:
        exact = texts(llm, {"mode": "ar"}, together=False)
        layers = runner(llm).model.model.layers
        linears = [m for m in layers.modules() if isinstance(m, LinearBase)]
        for method in {id(linear.quant_method): linear.quant_method for linear in linears}.values():
            sum_in_halves(method)
        assert row_difference(llm) > 0.001
        expected = texts(llm, {"mode": "ar"}, together=False)
        assert expected != exact  # the stand-in changes AR's text
        found = texts(llm, {"mode": "self_speculation"}, together=True)
        assert accepted(llm) > 0
        assert found != expected  # the modes do disagree
        for text in (expected, found):
            assert max(map(far_from_best, [llm] * 3, PROMPTS, text)) < NEAR_TIE


REFUSED = {
    "W8A16": "int8 weights",
    "NVFP4A16": "float4 weights",
    "MXFP4A16": "float4 weights",
    "MXFP8": "float8 weights",
}
if not has_amx():
    REFUSED["FP8_BLOCK"] = "AMX"
if not has_int4_product():
    REFUSED |= dict.fromkeys(("W4A16", "W4A16_ASYM"), "AVX-512")


@pytest.mark.parametrize("scheme", REFUSED)
@pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU has no kernel for")
def test_schemes_without_a_kernel_are_refused_in_one_line(scheme: str, plain: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(NLDError, match=rf"^quantization compressed-tensors {scheme} .* on cpu in bfloat16: ") as caught,
        engine(compress(plain, tmp_path / scheme, scheme), spec=True, dtype="bfloat16"),
    ):
        pass
    assert REFUSED[scheme] in str(caught.value)
    assert "\\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU has no kernel for")
def test_online_float8_is_refused_in_one_line(plain: Path) -> None:
    words = r"^quantization fp8 \(of plain weights\) on cpu in bfloat16: vLLM cannot run it: .*static_scaled_fp8_quant"
    with (
        pytest.raises(NLDError, match=words),
        engine(plain, spec=True, dtype="bfloat16", quantization="fp8"),
    ):
        pass
