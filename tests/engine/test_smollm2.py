"""A real language model, where ``vllm-nld get smollm2`` was run: self-speculation is AR, and its drafts are good.

The download and the conversion are too long for every run of the tests, so without the model these are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.engines import accepted, engine, generate, metric
from vllm_nld.checkpoints import cache_folder
from vllm_nld.checkpoints.draft_lora import FOLDER
from vllm_nld.cli.demo import QUESTIONS
from vllm_nld.conversion.pinned import PINNED, digest

MODEL = cache_folder() / "smollm2"
pytestmark = pytest.mark.skipif(
    not MODEL.is_dir(), reason=f"{MODEL} is not there (vllm-nld get smollm2; VLLM_NLD_CACHE is another place)"
)


@pytest.fixture(scope="module")
def llm() -> Iterator[Any]:
    with engine(MODEL, spec=True, max_model_len=512, max_num_seqs=4, kv_cache_memory_bytes=1 << 27) as llm:
        yield llm


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Chats with the demo's questions."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for _, text in QUESTIONS
    ]
    return [tokenizer.encode(chat, add_special_tokens=False) for chat in chats]


def test_the_model_is_as_pinned_with_the_adapter_of_the_package() -> None:
    assert digest(MODEL) == PINNED["smollm2"].weights
    assert digest(Path(MODEL / FOLDER)) == PINNED["smollm2"].adapter


def test_self_speculation_is_ar_and_accepts_more_than_one_draft(llm: Any, prompts: list[list[int]]) -> None:
    expected = generate(llm, prompts, each=[{"mode": "ar"}] * len(prompts), max_tokens=48)
    assert metric(llm, "vllm:spec_decode_num_drafts") == 0
    assert generate(llm, prompts, max_tokens=48) == expected
    assert 1 + accepted(llm) / metric(llm, "vllm:spec_decode_num_drafts") > 2


def test_drafts_need_the_adapter(llm: Any, prompts: list[list[int]]) -> None:
    """Without it, the model that drafts was never trained to fill in masks."""
    before = accepted(llm), metric(llm, "vllm:spec_decode_num_drafts")
    options = {"mode": "self_speculation", "prompt_lookup": 0, "draft_adapter": False}
    generate(llm, prompts[:2], each=[options] * 2, max_tokens=24)
    right, drafts = accepted(llm) - before[0], metric(llm, "vllm:spec_decode_num_drafts") - before[1]
    assert right / drafts < 0.5
