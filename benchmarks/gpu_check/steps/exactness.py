"""Compares greedy self-speculation with AR, token by token, on small models with clear differences between tokens."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_check.check import Check

CAPTURED = [1, 2, 4, 8, 16, 32, 64, 128]


@dataclass(frozen=True)
class Case:
    """A model in a dtype.

    Attributes:
        name: name in the output.
        dtype: type of weights and cache.
        backend: vLLM's attention backend; None for its own choice.
        must_agree: whether a different token is a fault. In bfloat16 a verify pass rounds differently from an AR step.
        tiny: the embedded checkpoint; else random weights with heads of 128, as the released models have.
        eager: without CUDA graphs.
    """

    name: str
    dtype: str
    backend: str | None
    must_agree: bool
    tiny: bool
    eager: bool = False


CASES = (
    Case("tiny, float32, graphs", "float32", "TRITON_ATTN", must_agree=True, tiny=True),
    Case("heads of 128, bfloat16, graphs", "bfloat16", None, must_agree=False, tiny=False),
    Case("heads of 128, float32, graphs", "float32", "TRITON_ATTN", must_agree=True, tiny=False),
    Case("tiny, float32, eager", "float32", "TRITON_ATTN", must_agree=True, tiny=True, eager=True),
)


def run(check: Check) -> None:
    """Compare in every case; a failed case does not stop the others.

    Raises:
        AssertionError: a text differs in a case that must agree.
    """
    # vLLM's Triton attention leaves float32 products to Triton, whose default is TF32: 10 bits of mantissa.
    os.environ["TRITON_F32_DEFAULT"] = "ieee"
    cases = CASES if not check.dry else CASES[:2]  # eager and graphs do not differ there
    wrong = [case.name for case in cases if not _agrees(check, case)]
    assert not wrong, f"self-speculation differs from AR: {'; '.join(wrong)}"


def _agrees(check: Check, case: Case) -> bool:
    from tests.support.engines import counters, engine, generate, random_prompts
    from vllm_nld.checkpoints import checkpoint_path

    folder = checkpoint_path("tiny") if case.tiny else _random(check)
    prompts = random_prompts([1, 5, 17, 40, 65, 130, 31, 200][: 8 if not check.dry else 3], 250)
    texts = {}
    for spec in (False, True):
        with engine(folder, spec=spec, **settings(check, case)) as llm:
            texts[spec] = generate(llm, prompts, max_tokens=check.sizes.new_tokens, ignore_eos=True)
            if spec:
                cycles, tokens = counters(llm)["cycles"], sum(map(len, texts[True]))
                check.figure("tokens a cycle", tokens / max(1, cycles), of=case.name)
    same = [a == b for a, b in zip(texts[False], texts[True], strict=True)]
    first = [_common(a, b) for a, b in zip(texts[False], texts[True], strict=True)]
    check.figure("texts that agree with AR", f"{sum(same)} of {len(same)}", of=case.name)
    check.figure("tokens before the first difference", min(first), of=case.name)
    return all(same) or not case.must_agree


def settings(check: Check, case: Case) -> dict[str, Any]:
    """Return a case's arguments of ``LLM``, besides the tests' own."""
    common: dict[str, Any] = {"dtype": case.dtype, "max_model_len": 512, "max_num_seqs": 8}
    if check.dry:
        return common
    if case.backend:
        common["attention_backend"] = case.backend
    if case.eager:
        return common | {"enforce_eager": True}
    return common | {"enforce_eager": False, "compilation_config": {"cudagraph_capture_sizes": CAPTURED}}


def _common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _random(check: Check) -> Path:
    """Write a checkpoint of random weights, once."""
    from tests.support.models import random_model, save, small_config, yarn

    folder = check.scratch / "heads_of_128"
    if not folder.exists():
        config = small_config(
            vocab_size=256, hidden_size=512, intermediate_size=1024, head_dim=128, block_size=16,
            num_hidden_layers=check.sizes.layers, max_position_embeddings=512, rope_parameters=yarn(original=128),
        )  # fmt: skip
        save(random_model(config), folder)
    return folder
