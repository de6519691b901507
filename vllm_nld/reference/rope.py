"""Rotary inverse frequencies of every ``rope_type`` that the config allows, written from their papers' formulas."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def inverse_frequencies(head_dim: int, rope: dict[str, Any]) -> Tensor:
    """Return the rotary inverse frequencies, float64 ``[head_dim // 2]``, in radians per position.

    Args:
        head_dim: size of a head.
        rope: ``rope_parameters`` as :class:`vllm_nld.config.NemotronLabsDiffusionConfig` keeps them.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    plain = float(rope["rope_theta"]) ** -exponents
    if rope["rope_type"] == "yarn":
        return _yarn(plain, head_dim, rope)
    if rope["rope_type"] == "llama3":
        return _llama3(plain, rope)
    if rope["rope_type"] == "linear":
        return plain / float(rope["factor"])
    return plain


def _yarn(plain: Tensor, head_dim: int, rope: dict[str, Any]) -> Tensor:
    """YaRN (arXiv 2309.00071, eq. 17-23): fast components keep their frequency, slow ones are divided by ``factor``.

    Between the components that turn ``beta_fast`` and ``beta_slow`` times in the original context lies a linear ramp.
    """
    original, theta = float(rope["original_max_position_embeddings"]), float(rope["rope_theta"])

    def component_turning(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(component_turning(rope.get("beta_fast", 32.0))), 0)
    high = min(math.ceil(component_turning(rope.get("beta_slow", 1.0))), head_dim - 1)
    index = torch.arange(head_dim // 2, dtype=torch.float64)
    ramp = ((index - low) / max(high - low, 1e-3)).clamp(0, 1)
    return plain * ((1 - ramp) + ramp / float(rope["factor"]))


def _llama3(plain: Tensor, rope: dict[str, Any]) -> Tensor:
    """Llama 3.1's scaling: as YaRN's, but the ramp is linear in the turns that a component makes.

    Components with more than ``high_freq_factor`` turns in the original context keep their frequency; those with fewer
    than ``low_freq_factor`` are divided by ``factor``.
    """
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    turns = float(rope["original_max_position_embeddings"]) * plain / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * (kept + (1 - kept) / float(rope["factor"]))
