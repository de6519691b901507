"""YaRN frequencies of the released configs, and the llama-4 query scale, against literal numbers."""

from __future__ import annotations

import pytest
import torch

from tests.support import models
from vllm_nld.reference.model import query_scale, rotate
from vllm_nld.reference.rope import inverse_frequencies

RELEASED = [
    (
        1e6,
        16.0,
        {
            16: 3.162277660e-2,
            24: 4.382954446e-3,
            32: 3.382352941e-4,
            40: 1.111424631e-5,
            48: 1.976423538e-6,
            63: 7.755861005e-8,
        },
    ),
    (
        1e9,
        16.0,
        {
            16: 4.305425771e-3,
            24: 5.930107079e-5,
            32: 1.976423538e-6,
            40: 1.482108566e-7,
            48: 1.111424631e-8,
            63: 8.639826421e-11,
        },
    ),
    (
        1e6,
        0.25,
        {
            16: 3.162277660e-2,
            24: 9.592881430e-3,
            32: 3.117647059e-3,
            40: 7.113117640e-4,
            48: 1.264911064e-4,
            63: 4.963751043e-6,
        },
    ),
]


@pytest.mark.parametrize(("theta", "factor", "expected"), RELEASED)
def test_yarn_of_released_configs(theta: float, factor: float, expected: dict[int, float]) -> None:
    rope = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": 16384,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }
    found = inverse_frequencies(128, rope)
    assert found.dtype == torch.float64
    assert found.shape == (64,)
    assert found[0] == 1
    for index, value in expected.items():
        assert float(found[index]) == pytest.approx(value, rel=1e-8, abs=0), index


def test_default_rope_is_plain() -> None:
    found = inverse_frequencies(8, {"rope_type": "default", "rope_theta": 1e4})
    assert found.tolist() == pytest.approx([1, 1e-1, 1e-2, 1e-3])


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_linear_rope_divides_by_the_factor() -> None:
    found = inverse_frequencies(8, {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0})
    assert found.tolist() == pytest.approx([0.25, 0.25e-1, 0.25e-2, 0.25e-3])


def test_llama3_rope() -> None:
    """Of Llama 3.1: short waves are kept, those over 8192 positions are divided by 8, a ramp lies between."""
    found = inverse_frequencies(128, LLAMA3)
    plain = 5e5 ** -(torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    ratio = plain / found
    assert found.dtype == torch.float64
    assert ratio[:29].tolist() == [1.0] * 29
    assert ratio[35:].tolist() == pytest.approx([8.0] * 29)
    # Component 31: a wave of 3616 positions turns 2.26 times in 8192, 0.42 of the way from 1 turn to 4.
    wave = 2 * torch.pi / float(plain[31])
    share = (8192 / wave - 1) / 3
    assert 0 < share < 1
    assert float(ratio[31]) == pytest.approx(1 / ((1 - share) / 8 + share))


@pytest.mark.parametrize(
    ("position", "scale"),
    [
        (0, 1.0),
        (16383, 1.0),
        (16384, 1.0693147),
        (32767, 1.0693147),
        (32768, 1.1098612),
        (65536, 1.1609438),
        (131072, 1.2197225),
        (262143, 1.2772589),
    ],
)
def test_query_scale(position: int, scale: float) -> None:
    found = query_scale(torch.tensor([position]), {"original_max_position_embeddings": 16384, "beta": 0.1})
    assert found.dtype == torch.float32
    if scale == 1.0:
        assert found.item() == 1.0
    else:
        assert found.item() == pytest.approx(scale, abs=2e-7)


def test_no_query_scale() -> None:
    assert query_scale(torch.tensor([0, 10**6]), None).tolist() == [1.0, 1.0]


def test_rotate_pairs_halves() -> None:
    """Components i and i + head_dim / 2 form a plane; a quarter turn takes (1, 0) to (0, 1)."""
    x = torch.tensor([1.0, 2.0, 0.0, 0.0]).view(1, 1, 1, 4)
    angles = torch.tensor([[torch.pi / 2, 0.0]])
    found = rotate(x, angles.cos(), angles.sin())
    assert found.flatten().tolist() == pytest.approx([0.0, 2.0, 1.0, 0.0], abs=1e-6)


ROPES = {
    "yarn": models.yarn(factor=4.0, original=64),
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4},
    "llama3": LLAMA3 | {"original_max_position_embeddings": 64},
    "default": {"rope_type": "default", "rope_theta": 1e4},
}


@pytest.mark.parametrize("name", ROPES)
def test_vllm_rope_equals_the_reference_in_every_supported_version(name: str) -> None:
    """vLLM 0.26 ignores ``attention_factor`` and would scale queries and keys by 0.1 ln(factor) + 1."""
    from vllm.config import VllmConfig, set_current_vllm_config

    from vllm_nld.vllm_glue import layers

    config = models.small_config(head_dim=64, rope_parameters=ROPES[name])
    with set_current_vllm_config(VllmConfig()):
        rope = layers.unscaled_rope(64, 256, config.rope_parameters)
    angles = torch.arange(256)[:, None] * inverse_frequencies(64, config.rope_parameters)
    expected = torch.cat((angles.cos(), angles.sin()), dim=1).float()
    torch.testing.assert_close(rope.cos_sin_cache.float()[:256], expected, atol=1e-4, rtol=0)
