"""What only a GPU can show. Skipped without one; never run so far."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import counters, engine, generate, random_prompts
from models import random_model, save, small_config

from vllm_nld.block_attention import block_attention
from vllm_nld.reference import ar_generate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_attention_agrees_with_the_cpu(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    query, key, value = draw(2, 16, 8, 64), draw(2, 16, 2, 64), draw(2, 16, 2, 64)
    prefix = draw(2, 2, 40, 64), draw(2, 2, 40, 64)
    mask = torch.ones(2, 1, 1, 56, dtype=torch.bool)
    mask[1, ..., 30:40] = False
    expected = block_attention(*(x.float() for x in (query, key, value)), tuple(p.float() for p in prefix), mask, 0.125)  # type: ignore[arg-type]
    found = block_attention(query.cuda(), key.cuda(), value.cuda(), tuple(p.cuda() for p in prefix), mask.cuda(), 0.125)  # type: ignore[arg-type]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.float().cpu(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("eager", [True, False])
def test_self_speculation_equals_the_reference(tmp_path: Path, eager: bool) -> None:
    """With CUDA graphs, too: the draft pass must see the block table of a step whose Python ``forward`` never ran."""
    model = random_model(small_config())
    folder = save(model, tmp_path)
    prompts = random_prompts([1, 17, 40, 65], model.config.vocab_size)
    expected = [ar_generate(model, ids, 24, eos_token_id=-1).ids[len(ids) :] for ids in prompts]
    with engine(folder, spec=True, enforce_eager=eager, max_model_len=256) as llm:
        assert generate(llm, prompts, ignore_eos=True) == expected
        assert counters(llm)["draft_forwards"] > 0
