"""Unsuitable settings are refused before weights load, in one line that names option, value and what is allowed."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.support.models import random_model, save, small_config
from vllm_nld.errors import NLDError, find


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model(small_config()), tmp_path_factory.mktemp("model"))


def refusal(folder: Path, **settings: Any) -> str:
    """The message with which vLLM's configuration (no weights, no workers) refuses the settings."""
    from vllm import EngineArgs

    with pytest.raises(Exception) as caught:  # whatever vLLM wraps it in
        EngineArgs(model=str(folder), skip_tokenizer_init=True, **settings).create_engine_config()
    error = find(caught.value)
    assert isinstance(error, NLDError), caught.value
    return str(error)


SPEC = {"model": "vllm_nld.SelfSpeculation"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"additional_config": {"nld": {"draft_treshold": 0.5}}}, ["draft_treshold", "0.5", "draft_threshold"]),
        ({"additional_config": {"nld": {"draft_threshold": "high"}}}, ["draft_threshold", "'high'", "number"]),
        (
            {"additional_config": {"nld": {"draft_threshold": 1.5}}},
            ["draft_threshold", "1.5", "less than or equal to 1"],
        ),
        ({"additional_config": {"nld": 3}}, ["nld", "3", "object"]),
        ({"speculative_config": SPEC | {"num_speculative_tokens": 8}}, ["num_speculative_tokens=8", "1 to 7"]),
        ({"speculative_config": SPEC | {"num_speculative_tokens": 500}}, ["num_speculative_tokens=500", "1 to 7"]),
        ({"speculative_config": SPEC | {"max_model_len": 128}}, ["speculative_config.max_model_len=128", "no effect"]),
        ({"speculative_config": SPEC | {"prompt_lookup_max": 4}}, ["prompt_lookup_max=4", "nld", "prompt_lookup"]),
        ({"speculative_config": SPEC | {"quantization": "fp8"}}, ["quantization='fp8'", "no effect"]),
        ({"speculative_config": SPEC | {"method": "ngram"}}, ["speculative_config.method='ngram'"]),
        (
            {"speculative_config": SPEC, "pipeline_parallel_size": 2},
            ["pipeline_parallel_size=2", "tensor_parallel_size"],
        ),
        (
            {"speculative_config": SPEC, "additional_config": {"nld": {"draft_lora": "/no/such"}}},
            ["draft_lora", "'off'"],
        ),
        ({"pipeline_parallel_size": 2, "enforce_eager": True}, ["enforce_eager=True", "pipeline_parallel_size=2"]),
        ({"speculative_config": SPEC, "kv_cache_dtype": "fp8_ds_mla"}, ["kv_cache_dtype=", "auto", "bfloat16", "fp8"]),
    ],
)
def test_unsuitable_options_are_refused(folder: Path, settings: dict[str, Any], words: list[str]) -> None:
    message = refusal(folder, **({"max_model_len": 256} | settings))
    for word in words:
        assert word in message
    assert "\n" not in message


def test_the_older_ray_executor_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    settings = {"speculative_config": SPEC, "distributed_executor_backend": "ray", "max_model_len": 256}
    monkeypatch.setenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", "0")
    message = refusal(folder, **settings)
    assert "VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0" in message
    assert "set it to 1" in message


def test_positions_past_the_rotary_table_are_refused(tmp_path: Path) -> None:
    """YaRN with factor < 1, as in the released 3B-Base: the table is shorter than max_position_embeddings."""
    from tests.support.models import yarn

    config = small_config(rope_parameters=yarn(factor=0.25, original=1024), max_position_embeddings=512)
    from vllm import EngineArgs

    engine_args = EngineArgs(
        model=str(save(random_model(config), tmp_path)), skip_tokenizer_init=True, max_model_len=512
    )
    with pytest.raises(Exception) as caught:  # vLLM 0.26 refuses this itself, later versions leave it to the plugin
        engine_args.create_engine_config()
    message = str(find(caught.value) or caught.value)
    assert re.search(r"max_model_len(=512| \(512\))", message)
    assert "256" in message


@pytest.mark.parametrize("damage", ["missing", "misshapen"])
def test_damaged_checkpoints_are_refused(folder: Path, tmp_path: Path, damage: str) -> None:
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    name = "encoder.layers.1.mlp.up_proj.weight"
    tensor = tensors.pop(name)
    if damage == "misshapen":
        tensors[name] = tensor[:-1].contiguous()
    save_file(tensors, broken / "model.safetensors")
    message = refusal(broken, max_model_len=256)
    assert name in message
    assert ("missing" in message) == (damage == "missing")


def test_default_number_of_drafts_follows_block_length(folder: Path) -> None:
    from vllm import EngineArgs

    args = EngineArgs(model=str(folder), skip_tokenizer_init=True, max_model_len=256, speculative_config=dict(SPEC))
    config = args.create_engine_config()
    assert config.speculative_config.num_speculative_tokens == 7
    assert config.parallel_config.worker_cls == "vllm_nld.worker.NLDCPUWorker"
