"""What ``--logprobs-mode`` returns in each mode: as in AR, except for diffusion's denoised tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.engines import accepted, engine
from tests.support.models import save_first_layers
from vllm_nld.checkpoints.held_out import held_out_prompts
from vllm_nld.reference import load_reference

PENALTY, TOKENS, BLOCK = 1.5, 20, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_first_layers(tmp_path_factory.mktemp("model") / "tiny")


def expected_rows(kind: str, folder: Path, prompt: list[int], tokens: list[int]) -> Tensor:
    """What the causal pass gives at every generated position, as vLLM defines the kind."""
    model = load_reference(folder)
    logits = model.causal(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1].detach().clone()
    if kind.startswith("processed"):
        for row, values in enumerate(logits):
            seen = torch.tensor(sorted({*prompt, *tokens[:row]}))
            values[seen] = torch.where(values[seen] > 0, values[seen] / PENALTY, values[seen] * PENALTY)
    return logits.log_softmax(-1) if kind == "processed_logprobs" else logits


@pytest.mark.parametrize("kind", ["raw_logits", "processed_logits", "processed_logprobs"])
def test_logprobs_modes(kind: str, folder: Path) -> None:
    from vllm import SamplingParams

    def run(llm: Any, mode: str, **sampling: Any) -> Any:
        settings: dict[str, Any] = {"temperature": 0, "logprobs": 2, "repetition_penalty": PENALTY} | sampling
        extra = {"nld": {"mode": mode}}
        params = SamplingParams(max_tokens=TOKENS, ignore_eos=True, extra_args=extra, **settings)
        ((_, text),) = held_out_prompts(1, characters=150)
        (output,) = llm.generate([text], params, use_tqdm=False)
        return output

    with engine(folder, spec=True, skip_tokenizer_init=False, logprobs_mode=kind) as llm:
        outputs = {mode: run(llm, mode) for mode in ("ar", "self_speculation", "auto", "diffusion")}
        before = accepted(llm)
        seeded = [run(llm, mode, temperature=0.8, top_k=9, seed=1).outputs[0] for mode in ("ar", "self_speculation")]
        assert accepted(llm) > before
    assert seeded[0].token_ids == seeded[1].token_ids
    for one, other in zip(seeded[0].logprobs, seeded[1].logprobs, strict=True):
        assert one.keys() == other.keys()
        assert all(abs(one[id_].logprob - other[id_].logprob) < 1e-3 for id_ in one)
    assert outputs["self_speculation"].outputs[0].token_ids == outputs["ar"].outputs[0].token_ids
    for mode, output in outputs.items():
        tokens = list(output.outputs[0].token_ids)
        expected = expected_rows(kind, folder, list(output.prompt_token_ids), tokens)
        for row, (token, entry) in enumerate(zip(tokens, output.outputs[0].logprobs, strict=True)):
            if mode == "diffusion" and kind.startswith("processed") and row % BLOCK:
                # The causal pass decides a block's first token; the others are certain by then, and all other tokens
                # impossible.
                assert entry[token].logprob == 0
                assert all(found.logprob == -torch.inf for id_, found in entry.items() if id_ != token)
                continue
            for id_, found in entry.items():
                assert abs(found.logprob - float(expected[row, id_])) < 1e-3, (mode, row)
