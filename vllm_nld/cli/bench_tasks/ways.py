"""What is compared: plain vLLM, this extension's modes, and vLLM's own speculation without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_nld.cli.engine import PROPOSER

AR = "AR"
OURS: dict[str, Any] = {"speculative_config": {"model": PROPOSER}, "scheduler_cls": None}
"""With the model runner that vLLM takes on this device, as a server has it."""
NGRAM = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4, "prompt_lookup_min": 2}


@dataclass(frozen=True)
class Way:
    """One way to decode.

    Attributes:
        settings: what its engine is started with; ways with equal ones share an engine.
        nld: a request's options; None for engines without this extension's speculation.
    """

    settings: dict[str, Any]
    nld: dict[str, Any] | None = None


def all_ways(thresholds: Sequence[float]) -> dict[str, Way]:
    """Return every way by name, diffusion once for each threshold.

    ``ngram`` is last: it imports numba, after which vLLM 0.32 starts no other engine in the process.
    """
    diffusion = {f"diffusion {value:g}": {"mode": "diffusion", "threshold": value} for value in thresholds}
    return {
        AR: Way({}),
        "self-speculation": Way(OURS, {"mode": "self_speculation", "prompt_lookup": 0}),
        "self-speculation, lookup": Way(OURS, {"mode": "self_speculation"}),
        **{name: Way(OURS, nld) for name, nld in diffusion.items()},
        "auto": Way(OURS, {"mode": "auto"}),
        "ngram": Way({"speculative_config": NGRAM, "scheduler_cls": None}),
    }
