"""Extreme values of options, and random options of the extension made of these and of suitable ones."""

from __future__ import annotations

import random
from typing import Any

from vllm_nld.options import MODES_OF_KEY

INTEGERS = [-(2**63), -1, 0, 1, 2, 3, 8, 15, 16, 17, 1000, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30]
FLOATS = [float("inf"), float("-inf"), float("nan"), 1e308, -1e308, 3.5e38, 1e-40, 5e-324, -0.0, 0.0, 0.3, 1.0, 2.0]
JUNK: list[Any] = ["", "auto", "1", "\ud800", "x" * 100_000, [], [1, "a"], [[1]], {}, {"a": 1}, None, True, False]
MODES = ["auto", "ar", "self_speculation", "diffusion", "diffusion"]
SAMPLERS = ["confidence_threshold", "top_k", "left_to_right", "entropy_budget", "learned"]


def option_value(rng: random.Random) -> Any:
    """Return a value: suitable, extreme or junk."""
    kind = rng.random()
    if kind < 0.4:
        return rng.choice([rng.random(), rng.randint(1, 16)])
    return rng.choice(INTEGERS + FLOATS) if kind < 0.9 else rng.choice(JUNK)


def options(rng: random.Random) -> dict[str, Any]:
    """Return options under ``nld``, with keys that fit the mode; about a third is admitted."""
    mode = rng.choice(MODES)
    fitting = [key for key, modes in MODES_OF_KEY.items() if mode in modes] or list(MODES_OF_KEY)
    nld: dict[str, Any] = {"mode": mode}
    for key in rng.sample(fitting, min(len(fitting), rng.choice([0, 1, 1, 2, 3]))):
        nld[key] = rng.choice(SAMPLERS) if key == "sampler" else option_value(rng)
    return nld
