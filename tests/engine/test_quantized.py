"""Packed int4 weights: the checkpoint starts, and self-speculation's text equals AR's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from vllm.platforms import current_platform

from tests.support.engines import accepted, engine, generate, random_prompts
from tests.support.models import random_model, save, small_config
from tests.support.quantized import quantize


def has_int4_product() -> bool:
    """Whether vLLM's operators for this CPU can multiply by packed int4 weights."""
    current_platform.import_kernels()
    return hasattr(torch.ops._C, "cpu_gemm_wna16")


@pytest.mark.skipif(not has_int4_product(), reason="vLLM's build for this CPU has no int4 product: AVX-512 is needed")
def test_packed_weights_work_in_every_mode(tmp_path: Path) -> None:
    plain = save(random_model(small_config(eos_token_id=None), seed=3), tmp_path / "plain")
    packed = quantize(plain, tmp_path / "packed", "w4a16")
    prompts = random_prompts([3, 40, 90], 24)
    with engine(packed, spec=True, dtype="bfloat16") as llm:
        text = generate(llm, prompts, [{"mode": "self_speculation"}] * 3)
        assert accepted(llm) > 0
        # One at a time: in bfloat16 the head's rounding may depend on the number of rows.
        assert text == [generate(llm, [ids], [{"mode": "ar"}])[0] for ids in prompts]
        (denoised,) = generate(llm, prompts[:1], [{"mode": "diffusion"}])
        assert len(denoised) == 24
