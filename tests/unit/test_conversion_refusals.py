"""What cannot be converted is refused by one line that says what is allowed, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import llamas
from vllm_nld.cli.convert import run as convert_command
from vllm_nld.conversion import Options, convert, open_source
from vllm_nld.errors import NLDError

ROPE = {"rope_type": "default", "rope_theta": 1e4}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [1.0] * 8,
        "original_max_position_embeddings": 64, "factor": 4.0}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


def refusal(source: Path, **options: Any) -> str:
    folder = source.parent / "nld"
    with pytest.raises(NLDError) as caught:
        convert(open_source(source), folder, Options(**options))
    assert not folder.exists()
    assert not list(source.parent.glob(".nld*"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model_type": "qwen2"}, ["model_type='qwen2'", "allowed: llama, mistral"]),
        ({"model_type": None}, ["model_type=None"]),
        ({"attention_bias": True}, ["attention_bias=True", "allowed: False"]),
        ({"mlp_bias": True}, ["mlp_bias=True"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'", "'silu'"]),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["quantization_config", "allowed: None"]),
        ({"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 2.0}}, ["rope_type='dynamic'", "'llama3'"]),
        ({"rope_parameters": LONG}, ["rope_type='longrope'"]),
        ({"rope_parameters": YARN}, ["attention factor of 1.139", "allowed: 1"]),
        ({"rope_parameters": YARN | {"attention_factor": 1.0, "truncate": False}}, ["truncate", "allowed: True"]),
        ({"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor", "allowed: 1"]),
        ({"model_type": "mistral", "sliding_window": 128}, ["sliding_window=128", "max_position_embeddings=256"]),
        ({"intermediate_size": 100}, ["mlp.gate_proj.weight has shape [96, 64], config.json asks for [100, 64]"]),
        ({"num_hidden_layers": 3}, ["layers.2.input_layernorm.weight is missing", "(and 6 more)"]),
        ({"tie_word_embeddings": False}, ["lm_head.weight is missing"]),
        ({"hidden_size": 0}, ["hidden_size"]),
    ],
)  # fmt: skip
def test_configs(settings: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    message = refusal(llamas.save_folder(llamas.llama(), tmp_path / "source", **settings))
    assert message.startswith(f"SOURCE={tmp_path / 'source'}: ")
    for word in words:
        assert word in message


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def with_tensor(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        save_file(load_file(folder / "model.safetensors") | {name: tensor}, folder / "model.safetensors")

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("config.json"), ["no config.json", "a Hugging Face folder", ".gguf"]),
        (without("model.safetensors"), ["no *.safetensors", "pickled"]),
        (without("tokenizer.json"), ["no tokenizer.json", "save_pretrained"]),
        (lambda folder: (folder / "config.json").write_text("{"), ["config.json is not JSON"]),
        (lambda folder: (folder / "config.json").write_text("[]"), ["config.json holds no object"]),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"abc"), ["model.safetensors cannot be read"]),
        (with_tensor("model.layers.0.self_attn.q_proj.bias", torch.ones(64)), ["q_proj.bias belongs to no Llama"]),
        (with_tensor("model.layers.0.self_attn.q_norm.weight", torch.ones(16)), ["q_norm.weight belongs to no Llama"]),
        (with_tensor("model.embed_tokens.weight", torch.ones(320, 64, dtype=torch.float64)), ["torch.float64"]),
    ],
)
def test_files(change: Callable[[Path], Any], words: list[str], tmp_path: Path) -> None:
    source = llamas.save_folder(llamas.llama(), tmp_path / "source")
    change(source)
    message = refusal(source)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "int8"}, ["--dtype int8", "float32, bfloat16, float16"]),
        ({"mask_token": "<nothing>"}, ["--mask-token <nothing>", "new, <|reserved_0|>, <|rare|>"]),
        ({"block_length": 0}, ["block_size=0"]),
    ],
)
def test_options(options: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    message = refusal(llamas.save_folder(llamas.llama(), tmp_path / "source"), **options)
    for word in words:
        assert word in message


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    source = llamas.save_folder(llamas.llama(), tmp_path / "source")
    (tmp_path / "nld").mkdir()
    (tmp_path / "nld" / "mine").write_text("keep")
    with pytest.raises(NLDError, match=r"FOLDER=.*nld: is there already; allowed: a folder that does not exist"):
        convert(open_source(source), tmp_path / "nld", Options())
    assert [path.name for path in (tmp_path / "nld").iterdir()] == ["mine"]


def test_target_is_checked_before_the_source_is_read(tmp_path: Path) -> None:
    with pytest.raises(NLDError, match="is there already"):
        convert_command(tmp_path / "nothing", tmp_path, Options(), as_json=False)
    with pytest.raises(NLDError, match="--dtype int8"):
        convert_command(tmp_path / "nothing", tmp_path / "new", Options(dtype="int8"), as_json=False)


@pytest.mark.parametrize("name", ["nothing", "model.bin"])
def test_sources_of_another_kind(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(NLDError, match=f"SOURCE=.*{name}.*allowed: a Hugging Face folder"):
        open_source(tmp_path / name)


def test_a_tokenizer_that_is_loaded_differently(tmp_path: Path) -> None:
    """transformers takes some tokenizers from the model's type instead of from their file."""
    source = llamas.save_folder(llamas.llama(), tmp_path / "source")
    found = open_source(source)
    (tmp_path / "other").mkdir()
    found.write_tokenizer(tmp_path / "other")
    llamas.tokenizer("gpt-2", ("<s>", "</s>")).save(str(tmp_path / "other" / "tokenizer.json"))
    with pytest.raises(NLDError, match="tokenizer cuts text differently"):
        found.check_tokenizer(tmp_path / "other")
