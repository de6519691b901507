"""int8 weights on two ranks: self-speculation, with the draft adapter on every target, writes AR's text."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.adapters import random_adapter
from tests.support.engines import accepted, engine, generate, random_prompts
from tests.support.models import random_model, save, small_config
from tests.support.quantized import compress
from vllm_nld.checkpoints.draft_lora import FOLDER, TARGETS

CONFIG = small_config(eos_token_id=None, hidden_size=128, intermediate_size=256)


@pytest.mark.usefixtures("two_spawned_ranks")
def test_self_speculation_equals_ar(tmp_path: Path) -> None:
    """A rank rounds its own share of a row-parallel layer's input, so the text need not be that of one rank."""
    plain = save(random_model(CONFIG, seed=3), tmp_path / "plain")
    random_adapter(CONFIG, targets=TARGETS, mask_row=True, size=0.15).write(plain / FOLDER, "somewhere")
    folder = compress(plain, tmp_path / "packed", "W8A8")
    prompts = random_prompts([3, 40], 24)
    with engine(folder, spec=True, dtype="bfloat16", tensor_parallel_size=2, max_num_seqs=4, max_model_len=64) as llm:
        text = generate(llm, prompts, [{"mode": "self_speculation"}] * 2, max_tokens=16)
        assert accepted(llm) > 0
        # One at a time: in bfloat16 the head's rounding may depend on the number of rows.
        assert text == [generate(llm, [ids], [{"mode": "ar"}], max_tokens=16)[0] for ids in prompts]
