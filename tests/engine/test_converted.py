"""Converted Llama models in vLLM: AR is the source's greedy text by transformers, and self-speculation is AR."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import llamas
from tests.support.engines import accepted, engine, generate, metric
from vllm_nld.conversion import Options, convert, open_source
from vllm_nld.reference import ar_generate, linear_spec_generate, load_reference

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    ("overrides", "mask_token"),
    [
        ({"rope_parameters": LLAMA3}, None),  # tied
        ({"rope_parameters": LINEAR, "tie_word_embeddings": False, "head_dim": 32}, "new"),  # 321 tokens
    ],
)
def test_tokens_equal_transformers(overrides: dict[str, Any], mask_token: str | None, tmp_path: Path) -> None:
    model = llamas.llama(seed=4, hidden_size=64, eos_token_id=None, **overrides)
    source = llamas.save_folder(model, tmp_path / "source")
    result = convert(open_source(source), tmp_path / "nld", Options(mask_token, block_length=8))
    reference = load_reference(tmp_path / "nld")
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(6, 320, (length,), generator=generator).tolist() for length in (2, 30, 90)]
    expected = []
    for ids in prompts:
        greedy = {"max_new_tokens": 24, "do_sample": False, "suppress_tokens": [result.mask_token_id]}
        if mask_token == "new":  # transformers has no such token
            del greedy["suppress_tokens"]
        whole = model.generate(torch.tensor([ids]), **greedy)[0].tolist()
        assert ar_generate(reference, ids, 24).ids == whole
        expected.append(whole[len(ids) :])
    drafts = [linear_spec_generate(reference, ids, 24) for ids in prompts]
    with engine(tmp_path / "nld", spec=True) as llm:
        assert generate(llm, prompts, each=[{"mode": "ar"}] * 3) == expected
        assert metric(llm, "vllm:spec_decode_num_drafts") == 0
        assert generate(llm, prompts) == expected
        assert accepted(llm) == sum(n - 1 for draft in drafts for n in draft.accepted)
        limit = llm.llm_engine.model_config.max_model_len
    assert limit == (1024 if mask_token == "new" else 256), "linear scaling multiplies the length"
