"""Self-speculation over a float8 KV cache as on a GPU: with scales for all heads or each, from the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import float8_cache
from tests.support.engines import accepted, counters, engine, generate, random_prompts, runner
from tests.support.models import random_model, save, small_config
from vllm_nld.attention import backend

SCHEME = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
K_SCALES, V_SCALES, Q_SCALES = [0.031, 0.057], [0.019, 0.011], [0.02, 0.03, 0.05, 0.04]


def with_scales(folder: Path, strategy: str) -> Path:
    """Write what llm-compressor does with a calibrated KV cache: scales per layer, and the config's scheme."""
    tensors = load_file(folder / "model.safetensors")
    for layer in {name.split(".")[2] for name in tensors if ".layers." in name}:
        for kind, scales in (("k", K_SCALES), ("v", V_SCALES), ("q", Q_SCALES)):
            scale = torch.tensor(scales).view(-1, 1, 1) if strategy == "attn_head" else torch.tensor(scales[:1])
            tensors[f"encoder.layers.{layer}.self_attn.{kind}_scale"] = scale
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": SCHEME | {"strategy": strategy},
        "total_num_heads": 4,
        "total_num_kv_heads": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
def test_self_speculation_equals_ar(strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(strategy, tmp_path, monkeypatch, engine)


def check(strategy: str, folder: Path, monkeypatch: pytest.MonkeyPatch, start: Callable[..., Any]) -> None:
    """Compare the texts of both modes, and see that drafts read the scales: without them, fewer are accepted."""
    float8_cache.install(monkeypatch)
    folder = with_scales(save(random_model(small_config(eos_token_id=None), 1), folder / "model"), strategy)
    prompts = random_prompts([3, 40, 70], 24)
    with start(folder, spec=True) as llm:
        layer = runner(llm).model.model.layers[0].self_attn.attn
        kinds = ("k", "v", "q")
        found = {kind: getattr(layer, f"_{kind}_scale").flatten().tolist() for kind in kinds}
        wanted = {"k": K_SCALES, "v": V_SCALES, "q": [0.03, 0.05]}  # the larger of two query heads
        if strategy == "tensor":
            wanted = {"k": K_SCALES[:1], "v": V_SCALES[:1], "q": Q_SCALES[:1]}
        assert found == {kind: pytest.approx(scales) for kind, scales in wanted.items()}
        texts = [generate(llm, prompts, [{"mode": mode}] * 3) for mode in ("self_speculation", "ar")]
        assert texts[0] == texts[1]
        assert counters(llm)["draft_forwards"] > 0
        right = accepted(llm)
        monkeypatch.setattr(backend, "head_scales", lambda layer: [3 * x for x in float8_cache.head_scales(layer)])
        assert generate(llm, prompts, [{"mode": "self_speculation"}] * 3) == texts[1], "drafts alone may suffer"
        assert accepted(llm) - right < right
