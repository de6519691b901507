"""Rotary parameters of other Llama models, as the config allows them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vllm_nld.errors import NLDError, shown
from vllm_nld.reference.rope import inverse_frequencies

LLAMA3_ORIGINAL, LLAMA3_LOW, LLAMA3_HIGH = 8192, 1.0, 4.0
"""What every released model with Llama 3's scaling has; its ``factor`` differs."""


def of_huggingface(source: object, rope: dict[str, Any]) -> dict[str, Any]:
    """Return ``rope_parameters`` for an NLD config; the config refuses those that it does not know.

    Args:
        source: named in messages.
        rope: transformers' ``rope_parameters``, or ``rope_scaling`` with ``rope_theta`` in it.

    Raises:
        NLDError: the parameters mean something that NLD does not support.
    """
    rope = {key: value for key, value in rope.items() if value is not None}
    rope.setdefault("rope_type", rope.pop("type", "default"))
    for key, allowed in (("partial_rotary_factor", 1.0), ("truncate", True)):
        if rope.pop(key, allowed) != allowed:
            raise NLDError(f"SOURCE={source}: {key} is set in the rotary parameters; allowed: {allowed}")
    if rope["rope_type"] == "yarn":
        factor = yarn_attention_factor(rope)
        if not math.isclose(factor, 1.0, abs_tol=1e-6):
            raise NLDError(
                f"SOURCE={source}: YaRN with an attention factor of {factor:.4g}; allowed: 1, which NLD's models were "
                "trained with (attention_factor=1, or mscale equal to mscale_all_dim)"
            )
        # The config class pins the factor; other readers take it from these two.
        rope |= {"mscale": 1.0, "mscale_all_dim": 1.0}
        rope.pop("attention_factor", None)
    return rope


def yarn_attention_factor(rope: dict[str, Any]) -> float:
    """Return what transformers multiplies queries and keys by, for complete YaRN parameters."""
    given, factor = rope.get("attention_factor"), rope.get("factor")
    if given is not None:
        return float(given)
    if not isinstance(factor, (int, float)) or factor <= 1:
        return 1.0
    scale, over = rope.get("mscale"), rope.get("mscale_all_dim")

    def grown(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1

    return grown(scale) / grown(over) if scale and over else grown(1)


def of_gguf(source: object, head_dim: int, theta: float, kind: str, factor: float, divisors: Tensor | None) -> Any:
    """Return ``rope_parameters`` for an NLD config.

    Args:
        source: named in messages.
        head_dim: size of a head.
        theta: ``rope.freq_base``.
        kind: ``rope.scaling.type``.
        factor: ``rope.scaling.factor``, or 1.
        divisors: float32 ``[head_dim // 2]``, the tensor ``rope_freqs``, which Llama 3's scaling ends up in.

    Raises:
        NLDError: the parameters mean something that NLD does not support.
    """
    plain = {"rope_type": "default", "rope_theta": theta}
    if kind not in ("none", "linear"):
        raise NLDError(
            f"SOURCE={source}: rope.scaling.type={shown(kind)}; allowed: none, linear (llama.cpp's YaRN has an "
            "attention factor, which NLD's YaRN does not have)"
        )
    linear = kind == "linear" and factor != 1
    if divisors is None:
        return plain | ({"rope_type": "linear", "factor": factor} if linear else {})
    guess = plain | {
        "rope_type": "llama3",
        "factor": float(divisors.max()),
        "low_freq_factor": LLAMA3_LOW,
        "high_freq_factor": LLAMA3_HIGH,
        "original_max_position_embeddings": LLAMA3_ORIGINAL,
    }
    expected = inverse_frequencies(head_dim, plain) / inverse_frequencies(head_dim, guess)
    if linear or divisors.shape != expected.shape or not torch.allclose(divisors.double(), expected, rtol=1e-3):
        raise NLDError(
            f"SOURCE={source}: the tensor rope_freqs.weight is not Llama 3's scaling (original length "
            f"{LLAMA3_ORIGINAL}, factors {LLAMA3_LOW:g} and {LLAMA3_HIGH:g}); allowed: that, or none"
        )
    return guess
