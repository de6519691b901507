"""Float8 caches and quantized weights on a GPU, in bfloat16: self-speculation writes AR's text up to near ties.

GPU kernels choose tiles by the number of rows, so a verify pass rounds differently from an AR step. vLLM takes a float8
cache with its FlashAttention, at the released models' head size.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.test_float8_cache import with_scales
from tests.support.engines import NEAR_TIE, accepted, engine, far_from_best, generate, random_prompts
from tests.support.models import random_model, save, small_config
from tests.support.quantized import compress

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
RUNNERS = {"first": "0", "second": "1"}
CONFIG = small_config(hidden_size=256, intermediate_size=512, head_dim=128)
PROMPTS = random_prompts([3, 40, 90], CONFIG.vocab_size)
CACHES = ["float8", "a scale", "a scale for each head"]
SCHEMES = ["online", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK"]


@pytest.fixture(params=RUNNERS)
def second(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", RUNNERS[request.param])
    return bool(request.param == "second")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model(CONFIG, seed=3), tmp_path_factory.mktemp("plain") / "model")


def served(folder: Path, second: bool, **settings: Any) -> AbstractContextManager[Any]:
    """An engine, with CUDA graphs on the second runner, on which the draft pass runs in them."""
    defaults: dict[str, Any] = {"max_num_seqs": 4, "max_model_len": 256, "enforce_eager": not second}
    return engine(folder, spec=True, dtype="bfloat16", **(defaults | settings))


def check_texts(llm: Any) -> None:
    for _ in range(2):  # the second time, nothing is compiled
        before = accepted(llm)
        found = generate(llm, PROMPTS, [{"mode": "self_speculation"}] * 3, ignore_eos=True)
        assert max(map(far_from_best, [llm] * 3, PROMPTS, found)) < NEAR_TIE
        assert accepted(llm) > before
    diffused = generate(llm, PROMPTS, [{"mode": "diffusion", "threshold": 0.4}] * 3, ignore_eos=True)
    assert [len(text) for text in diffused] == [24] * 3


@pytest.mark.parametrize("cache", CACHES)
def test_float8_cache(cache: str, second: bool, tmp_path: Path) -> None:
    folder = save(random_model(CONFIG, seed=1), tmp_path / "model")
    settings: dict[str, Any] = {}
    if cache == "float8":
        settings = {"kv_cache_dtype": "fp8"}
    else:
        with_scales(folder, "attn_head" if cache.endswith("head") else "tensor")
    with served(folder, second, **settings) as llm:
        check_texts(llm)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_weights(scheme: str, second: bool, plain: Path, tmp_path: Path) -> None:
    folder = plain if scheme == "online" else compress(plain, tmp_path / scheme, scheme)
    settings = {"quantization": "fp8"} if scheme == "online" else {}
    with served(folder, second, **settings) as llm:
        check_texts(llm)
