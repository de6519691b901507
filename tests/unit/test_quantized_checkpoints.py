"""Packed weights pass the check of tensor headers, and a cache that the draft pass cannot read is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.support import models
from tests.support.quantized import FORMATS, quantize
from vllm_nld.checkpoints.headers import check_tensors
from vllm_nld.errors import NLDError
from vllm_nld.model.engine_config import _check_cache, _check_weights

CONFIG = models.small_config()
SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
COMPRESSED = {"quant_method": "compressed-tensors", "kv_cache_scheme": SCHEME}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(models.random_model(CONFIG), tmp_path_factory.mktemp("model"))


def as_the_hook_finds_it(folder: Path, quantization: str | None) -> Any:
    """vLLM's config at the time of the hook: the model config has the method, but there is no ``quant_config`` yet."""
    return SimpleNamespace(
        model_config=SimpleNamespace(model=str(folder), hf_config=CONFIG, quantization=quantization),
        load_config=SimpleNamespace(load_format="auto"),
        quant_config=None,
    )


@pytest.mark.parametrize("kind", FORMATS)
def test_packed_weights_do_not_count_as_missing(folder: Path, tmp_path: Path, kind: str) -> None:
    packed = quantize(folder, tmp_path / kind, kind)
    _check_weights(as_the_hook_finds_it(packed, kind))
    with pytest.raises(NLDError, match=r"is missing|has shape"):
        _check_weights(as_the_hook_finds_it(packed, None))


@pytest.mark.parametrize("kind", FORMATS)
def test_missing_packed_weights_are_named(folder: Path, tmp_path: Path, kind: str) -> None:
    packed = quantize(folder, tmp_path / kind, kind)
    tensors = load_file(packed / "model.safetensors")
    gone = [name for name in tensors if name.startswith("encoder.layers.1.mlp.up_proj.")]
    for name in gone:
        del tensors[name]
    save_file(tensors, packed / "model.safetensors")
    with pytest.raises(NLDError, match=r"encoder\.layers\.1\.mlp\.up_proj\.weight is missing, packed or plain$"):
        check_tensors(packed, CONFIG, quantized=True)
    tensors[gone[0]] = tensors["encoder.norm.weight"].clone()
    tensors["encoder.norm.weight"] = tensors["encoder.norm.weight"][:3].contiguous()
    save_file(tensors, packed / "model.safetensors")
    with pytest.raises(NLDError, match=r"encoder\.norm\.weight has shape \[3\]"):
        check_tensors(packed, CONFIG, quantized=True)


def config(device: str, cache_dtype: str, quantization: dict[str, Any] | None) -> Any:
    hf_config = SimpleNamespace() if quantization is None else SimpleNamespace(quantization_config=quantization)
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=hf_config),
        cache_config=SimpleNamespace(cache_dtype=cache_dtype),
        device_config=SimpleNamespace(device_type=device),
    )


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_float8_cache_is_taken(device: str) -> None:
    per_head = COMPRESSED | {"kv_cache_scheme": SCHEME | {"strategy": "attn_head"}}
    for quantization in (None, COMPRESSED, per_head, {"quant_method": "gptq"}, {"kv_cache_scheme": None}):
        _check_cache(config(device, "auto", quantization))
    for cache_dtype in ("fp8", "fp8_e4m3", "fp8_e5m2", "bfloat16"):
        _check_cache(config(device, cache_dtype, None))
    _check_cache(config(device, "fp8", {"quant_method": "modelopt", "kv_cache_quant_algo": "FP8"}))


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "modelopt", "quantization": {"kv_cache_quant_algo": "NVFP4"}},
        {"quant_method": "modelopt", "kv_cache_quant_algo": "NVFP4"},
    ],
    ids=["modelopt nested", "modelopt"],
)
def test_other_caches_of_the_checkpoint_are_refused(device: str, quantization: dict[str, Any]) -> None:
    with pytest.raises(NLDError) as caught:
        _check_cache(config(device, "nvfp4", quantization))
    for word in ("kv_cache_dtype='nvfp4'", "checkpoint's quantization config asks for", "--kv-cache-dtype bfloat16"):
        assert word in str(caught.value)
    _check_cache(config(device, "bfloat16", quantization))


@pytest.mark.parametrize("cache_dtype", ["nvfp4", "fp8_per_token_head", "int8_per_token_head", "fp8_ds_mla"])
def test_other_caches_of_the_user_are_refused(cache_dtype: str) -> None:
    with pytest.raises(NLDError, match=f"kv_cache_dtype='{cache_dtype}'") as caught:
        _check_cache(config("cuda", cache_dtype, None))
    assert "checkpoint" not in str(caught.value)
