"""Which part of a projection's adapter a tensor-parallel rank has, and where in the layer that packs projections."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_nld.checkpoints.draft_lora import projection_size
from vllm_nld.config import NemotronLabsDiffusionConfig

PACKED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}
"""vLLM's linear layers, and the projections that each computes, side by side in its output."""

ROW_PARALLEL = ("o_proj", "down_proj")


@dataclass(frozen=True)
class Share:
    """What one rank has of a projection, inside the linear layer that computes it.

    Attributes:
        target: the projection's name, such as ``q_proj``.
        inputs: of the projection, this rank's: of a row-parallel layer a part, else all.
        outputs: the same: of a column-parallel layer a part, else all.
        start: the column of the layer's output at which this rank's ``outputs`` begin.
    """

    target: str
    inputs: range
    outputs: range
    start: int


def shares_of(config: NemotronLabsDiffusionConfig, linear: str, rank: int, shards: int) -> list[Share]:
    """Return a rank's share of every projection of a linear layer, cut as vLLM cuts the weights.

    Args:
        config: of the model.
        linear: the layer, one of :data:`PACKED`.
        rank: the tensor-parallel rank.
        shards: how many there are.
    """
    shares: list[Share] = []
    start = 0
    for target in PACKED[linear]:
        inputs, outputs = projection_size(config, target)
        if linear in ROW_PARALLEL:
            own = Share(target, _part(inputs, rank, shards), range(outputs), start)
        else:
            # Where there are more ranks than KV heads, neighbors have the same head.
            parts = min(shards, config.num_key_value_heads) if target in ("k_proj", "v_proj") else shards
            own = Share(target, range(inputs), _part(outputs, rank * parts // shards, parts), start)
        shares.append(own)
        start += len(own.outputs)
    return shares


def _part(size: int, index: int, parts: int) -> range:
    each = size // parts
    return range(index * each, (index + 1) * each)
