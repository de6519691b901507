"""The configuration of the model that reads images, and the tensors it asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.support import models
from vllm_nld.checkpoints.headers import check_tensors, expected_image_tensors, expected_tensors
from vllm_nld.config import (
    NemotronLabsDiffusionConfig,
    NemotronLabsDiffusionVLMConfig,
    released_rope_parameters,
    released_vision_config,
)
from vllm_nld.errors import NLDError

RELEASED: dict[str, Any] = {
    "architectures": ["NemotronLabsDiffusionVLMModel"],
    "model_type": "nemotron_labs_diffusion_vlm",
    "vocab_size": 131073,
    "hidden_size": 4096,
    "num_hidden_layers": 34,
    "mask_token_id": 100,
    # The released file has the key under both names.
    "rope_parameters": released_rope_parameters() | {"type": "yarn"},
    "vision_config": released_vision_config() | {"head_dim": 64},
    "spatial_merge_size": 2,
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": False,
    "vision_feature_layer": -1,
}
PROJECTOR = "encoder.multi_modal_projector.linear_2.weight"


def test_the_released_layout_is_read_and_written(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RELEASED))
    config = NemotronLabsDiffusionVLMConfig.from_pretrained(tmp_path)
    assert config.image_cell == 28
    assert config.image_token_ids == (18, 19, 20, 21)
    assert config.never_emitted == (100, 131072)
    assert config.vision_config.head_dim == 64
    assert config.position_limit == 262144
    config.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    released = RELEASED | {"rope_parameters": released_rope_parameters()}
    assert {key: written[key] for key in released if key != "vision_config"} == {
        key: value for key, value in released.items() if key != "vision_config"
    }
    assert written["vision_config"].items() >= RELEASED["vision_config"].items()
    assert NemotronLabsDiffusionVLMConfig.from_pretrained(tmp_path / "again").never_emitted == (100, 131072)


def test_the_text_part_is_a_text_model() -> None:
    config = models.small_vlm_config()
    text = config.text_config
    assert type(text) is NemotronLabsDiffusionConfig
    assert config.get_text_config().to_dict() == text.to_dict()
    expected = models.small_config(architectures=["VllmNLDForCausalLM"]).to_dict()
    assert {key: text.to_dict()[key] for key in expected} == expected
    assert not {key for key in text.to_dict() if "image" in key or "vision" in key or "projector" in key}
    assert text.never_emitted == config.never_emitted == (5,)
    both = models.small_vlm_config(added_mask_token_id=7)
    assert both.text_config.never_emitted == both.never_emitted == (5, 7)
    assert NemotronLabsDiffusionConfig(**both.text_config.to_dict()).never_emitted == (5, 7)


def test_tensors_are_those_of_the_released_model() -> None:
    """222 tensors, of which a public loader names these shapes."""
    shapes = expected_image_tensors(NemotronLabsDiffusionVLMConfig(**RELEASED))
    assert len(shapes) == 222
    assert shapes["encoder.vision_tower.patch_conv.weight"] == (1024, 3, 14, 14)
    assert shapes["encoder.multi_modal_projector.patch_merger.merging_layer.weight"] == (1024, 4096)
    assert shapes["encoder.multi_modal_projector.linear_1.weight"] == (4096, 1024)
    assert shapes[PROJECTOR] == (4096, 4096)
    assert shapes["encoder.vision_tower.transformer.layers.23.feed_forward.down_proj.weight"] == (1024, 4096)


def test_a_missing_tensor_of_the_projector_is_named(tmp_path: Path) -> None:
    config = models.small_vlm_config()
    file = models.save_vlm(config, tmp_path) / "model.safetensors"
    check_tensors(tmp_path, config)
    tensors = load_file(file)
    assert tensors.keys() == expected_tensors(config).keys()
    del tensors[PROJECTOR]
    save_file(tensors, file)
    with pytest.raises(NLDError, match=f"{PROJECTOR} is missing"):
        check_tensors(tmp_path, config)
    check_tensors(tmp_path, config.text_config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projector_hidden_act": "relu"}, "projector_hidden_act='relu'; allowed: 'gelu'"),
        ({"multimodal_projector_bias": True}, "multimodal_projector_bias=True; allowed: False"),
        ({"vision_feature_layer": -2}, "vision_feature_layer=-2; allowed: -1"),
        ({"vision_config": {"hidden_act": "gelu"}}, "vision_config.hidden_act='gelu'; allowed: 'silu'"),
        ({"vision_config": {"head_dim": 32}}, "vision_config.head_dim=32; allowed: 64"),
        ({"vision_config": {"image_size": 27}}, "image_size=27 is less than patch_size"),
        ({"vision_config": {"patch_size": 0}}, "vision_config.patch_size=0, but a positive integer is needed"),
        ({"vision_config": {"num_attention_heads": 0}}, "num_attention_heads=0, but a positive"),
        ({"text_config": {"hidden_size": 64}}, "text_config, but the text model's fields are needed"),
        ({"spatial_merge_size": 0}, "spatial_merge_size=0, but a positive integer is needed"),
        ({"image_pad_token_id": 18}, r"image tokens are \[18, 18, 20, 21\], but they must differ"),
        ({"image_end_token_id": 100}, r"image tokens are \[18, 19, 20, 100\], but they must differ"),
        ({"image_end_token_id": 131073}, r"lie in \[0, 131073\)"),
    ],
)
def test_unsuitable_values_are_named(changes: dict[str, Any], message: str) -> None:
    vision = RELEASED["vision_config"] | changes.get("vision_config", {})
    with pytest.raises(ValueError, match=message):
        NemotronLabsDiffusionVLMConfig(**(RELEASED | changes | {"vision_config": vision}))
