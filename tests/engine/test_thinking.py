"""Thinking budgets in batches: every mode ends each thinking section where plain vLLM does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.support.engines import accepted, engine, runner
from tests.support.models import save_first_layers
from vllm_nld.checkpoints.held_out import held_out_prompts
from vllm_nld.reference import ar_generate, load_reference

START, END = 12, 13
TEXTS = [text for _, text in held_out_prompts(6, characters=150)]
BUDGETS = [3, 8, 0, 4, 12, 5]
TOKENS = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded checkpoint's first layers, but where they would write a frequent token, they start to think."""
    from transformers import AutoTokenizer

    made = save_first_layers(tmp_path_factory.mktemp("model") / "thinking")
    model, tokenizer = load_reference(made), AutoTokenizer.from_pretrained(made)
    counts: Counter[int] = Counter()
    for text in TEXTS:
        ids = tokenizer.encode(text)
        counts.update(ar_generate(model, ids, TOKENS).ids[len(ids) :])
    weights = load_file(made / "model.safetensors")
    weights["diffusion_head.weight"][START] = 1.02 * weights["diffusion_head.weight"][counts.most_common(1)[0][0]]
    save_file(weights, made / "model.safetensors")
    return made


def settings(end: str) -> dict[str, Any]:
    from vllm.config.reasoning import ReasoningConfig

    reasoning = ReasoningConfig(reasoning_parser="deepseek_r1", reasoning_start_str="<think>", reasoning_end_str=end)
    return {"reasoning_config": reasoning, "skip_tokenizer_init": False, "max_num_seqs": 8, "max_model_len": 256}


def texts(llm: Any, mode: str | None) -> list[list[int]]:
    """The texts of requests with budgets of their own, and of one without, in one batch."""
    from vllm import SamplingParams

    tokenizer = llm.get_tokenizer()
    extra: dict[str, Any] = {} if mode is None else {"extra_args": {"nld": {"mode": mode}}}
    shared = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True} | extra
    params = [SamplingParams(thinking_token_budget=budget, **shared) for budget in BUDGETS]
    prompts = [{"prompt_token_ids": [*tokenizer.encode(text), START]} for text in TEXTS]
    outputs = llm.generate([*prompts, prompts[0]], [*params, SamplingParams(**shared)], use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("end", ["</think>", " ok</think>:"])
def test_every_mode_thinks_as_plain_vllm(folder: Path, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also as vLLM before 0.32 samples steps without drafts: by the plain sampler, which is not told of drafts."""
    with engine(folder, **settings(end)) as llm:
        expected = texts(llm, None)
    assert sum(text.count(START) > 1 and text.count(END) > 1 for text in expected) > 2, "hardly any second section"
    assert END not in expected[-1]
    with engine(folder, spec=True, **settings(end)) as llm:
        own = runner(llm)
        sample = own._sample
        plainly = 0

        def sample_as_before(logits: Any, metadata: Any) -> Any:
            nonlocal plainly
            if metadata is not None and not any(metadata.num_draft_tokens):
                plainly, metadata = plainly + 1, None
            return sample(logits, metadata)

        for patch in (sample, sample_as_before):
            monkeypatch.setattr(own, "_sample", patch)
            for mode in ("ar", "self_speculation", "auto"):
                assert texts(llm, mode) == expected, (mode, patch.__name__)
        assert plainly > 0
        assert accepted(llm) > 0
