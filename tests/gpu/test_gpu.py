"""Tests that need a GPU. Skipped without one; never run so far."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.engines import counters, engine, generate, random_prompts
from tests.support.models import random_model, save, small_config
from vllm_nld.reference import ar_generate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("eager", [True, False])
def test_self_speculation_equals_the_reference(tmp_path: Path, eager: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with CUDA graphs: the draft pass must get the block table of a step whose Python ``forward`` never ran."""
    # The only backend that takes float32 leaves its products to Triton, whose default is TF32.
    monkeypatch.setenv("TRITON_F32_DEFAULT", "ieee")
    model = random_model(small_config())
    folder = save(model, tmp_path)
    prompts = random_prompts([1, 17, 40, 65], model.config.vocab_size)
    expected = [ar_generate(model, ids, 24, eos_token_id=-1).ids[len(ids) :] for ids in prompts]
    settings = {"enforce_eager": eager, "max_model_len": 256, "max_num_seqs": 8, "attention_backend": "TRITON_ATTN"}
    with engine(folder, spec=True, **settings) as llm:
        assert generate(llm, prompts, ignore_eos=True) == expected
        assert counters(llm)["draft_forwards"] > 0
