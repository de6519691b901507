"""The configuration class on the released layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_nld.checkpoints.headers import expected_tensors
from vllm_nld.config import NemotronLabsDiffusionConfig, released_rope_parameters

SHAPE_3B = {"num_hidden_layers": 26, "hidden_size": 3072, "intermediate_size": 9216}
RELEASED: dict[str, dict[str, Any]] = {
    "3B": SHAPE_3B,
    "8B": {},
    "14B": {
        "num_hidden_layers": 40,
        "hidden_size": 5120,
        "intermediate_size": 16384,
        "rope_parameters": released_rope_parameters() | {"rope_theta": 1e9},
    },
    "3B-Base": SHAPE_3B
    | {
        "max_position_embeddings": 4096,
        "eos_token_id": 2,
        "rope_parameters": released_rope_parameters() | {"factor": 0.25},
    },
}


def released(name: str) -> NemotronLabsDiffusionConfig:
    return NemotronLabsDiffusionConfig(**RELEASED[name])


@pytest.mark.parametrize(
    ("name", "layers", "hidden", "mlp", "theta", "factor", "eos", "limit"),
    [
        ("3B", 26, 3072, 9216, 1e6, 16.0, 11, 262144),
        ("8B", 34, 4096, 14336, 1e6, 16.0, 11, 262144),
        ("14B", 40, 5120, 16384, 1e9, 16.0, 11, 262144),
        ("3B-Base", 26, 3072, 9216, 1e6, 0.25, 2, 4096),
    ],
)
def test_released_layouts_are_read(
    name: str, layers: int, hidden: int, mlp: int, theta: float, factor: float, eos: int, limit: int
) -> None:
    config = released(name)
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (layers, hidden, mlp)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (32, 8, 128)
    assert (config.vocab_size, config.block_size, config.mask_token_id) == (131072, 32, 100)
    assert (config.rope_parameters["rope_theta"], config.rope_parameters["factor"]) == (theta, factor)
    assert config.eos_token_id == eos
    assert config.position_limit == limit
    assert not config.tie_word_embeddings


@pytest.mark.parametrize("name", RELEASED)
def test_rope_parameters_are_rearranged_and_restored(name: str) -> None:
    config = released(name)
    assert config.rope_parameters["attention_factor"] == 1.0
    assert "llama_4_scaling_beta" not in config.rope_parameters
    assert config.llama_4_scaling == {"original_max_position_embeddings": 16384, "beta": 0.1}
    saved = config.to_dict()
    assert saved["rope_parameters"] == RELEASED[name].get("rope_parameters", released_rope_parameters())
    assert "llama_4_scaling" not in saved
    assert config.rope_parameters["attention_factor"] == 1.0, "to_dict() must not change the config itself"


def test_attention_factor_of_the_file_is_overridden() -> None:
    rope = released_rope_parameters() | {"attention_factor": 1.277}
    assert NemotronLabsDiffusionConfig(rope_parameters=rope).rope_parameters["attention_factor"] == 1.0


def test_dictionary_of_the_caller_is_not_changed() -> None:
    rope = released_rope_parameters()
    NemotronLabsDiffusionConfig(rope_parameters=rope)
    assert rope == released_rope_parameters()


@pytest.mark.parametrize("name", RELEASED)
def test_round_trip(name: str, tmp_path: Path) -> None:
    config = released(name)
    config.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["model_type"] == "nemotron_labs_diffusion"
    assert raw["rope_parameters"]["llama_4_scaling_beta"] == 0.1
    again = NemotronLabsDiffusionConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict() | {"transformers_version": again.to_dict().get("transformers_version")}
    assert again.rope_parameters == config.rope_parameters
    assert again.llama_4_scaling == config.llama_4_scaling
    assert again.position_limit == config.position_limit


def test_position_limit_of_default_rope() -> None:
    config = NemotronLabsDiffusionConfig(
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, max_position_embeddings=1000
    )
    assert config.position_limit == 1000
    assert config.llama_4_scaling is None


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("rope", "limit"), [(LLAMA3, 131072), ({"rope_type": "linear", "rope_theta": 1e4, "factor": 4}, 4 * 131072)]
)
def test_ropes_of_other_llamas(rope: dict[str, Any], limit: int, tmp_path: Path) -> None:
    """Linear scaling leaves ``max_position_embeddings`` unscaled, as transformers and vLLM have it."""
    config = NemotronLabsDiffusionConfig(rope_parameters=rope | {"unknown": 1}, max_position_embeddings=131072)
    assert config.rope_parameters == rope
    assert isinstance(config.rope_parameters["factor"], float), "vLLM asks for one"
    assert config.position_limit == limit
    config.save_pretrained(tmp_path)
    assert NemotronLabsDiffusionConfig.from_pretrained(tmp_path).rope_parameters == rope


def test_absent_head_dim_is_derived() -> None:
    assert NemotronLabsDiffusionConfig(hidden_size=2048, head_dim=None).head_dim == 64


def test_theta_next_to_the_dictionary() -> None:
    rope = {key: value for key, value in released_rope_parameters().items() if key != "rope_theta"}
    assert NemotronLabsDiffusionConfig(rope_parameters=rope, rope_theta=1e9).rope_parameters["rope_theta"] == 1e9
    assert NemotronLabsDiffusionConfig(rope_parameters=rope).rope_parameters["rope_theta"] == 1e6


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"hidden_size": 0}, ["hidden_size=0", "positive"]),
        ({"num_hidden_layers": -1}, ["num_hidden_layers=-1"]),
        ({"block_size": "32"}, ["block_size='32'"]),
        ({"vocab_size": None}, ["vocab_size=None"]),
        ({"num_attention_heads": 30}, ["num_attention_heads=30", "num_key_value_heads=8"]),
        ({"mask_token_id": 131072}, ["mask_token_id=131072", "[0, 131072)"]),
        ({"mask_token_id": -1}, ["mask_token_id=-1"]),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 8.0}},
            ["'dynamic'", "'default', 'linear', 'llama3', 'yarn'"],
        ),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, ["low_freq_factor=None", "llama3"]),
        ({"rope_parameters": {"rope_type": "linear"}}, ["factor=None", "linear"]),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "llama_4_scaling_beta": 0.1}},
            ["llama_4_scaling_beta"],
        ),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 8.0}}, ["original_max_position_embeddings=None"]),
        ({"rope_parameters": released_rope_parameters() | {"factor": 0}}, ["factor=0"]),
        ({"rope_parameters": {"rope_type": "default", "llama_4_scaling_beta": 0.1}}, ["llama_4_scaling_beta"]),
    ],
)
def test_bad_values_are_named(overrides: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        NemotronLabsDiffusionConfig(**overrides)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [("3B", 237, 3_831_659_520), ("8B", 309, 8_489_553_920), ("14B", 363, 13_506_073_600)],
)
def test_tensor_and_parameter_counts(name: str, tensors: int, parameters: int) -> None:
    shapes = expected_tensors(released(name))
    assert len(shapes) == tensors
    assert sum(shape[0] * (shape[1] if len(shape) == 2 else 1) for shape in shapes.values()) == parameters
