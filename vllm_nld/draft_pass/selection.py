"""Each row of a forward by its own selection policy (:mod:`vllm_nld.policies`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_nld.draft_pass.block import Block
from vllm_nld.policies import POLICIES, Rows
from vllm_nld.policies.base import Need


def select(
    blocks: Sequence[Block],
    masked: Tensor,
    confidence: Tensor,
    entropy: Tensor | None = None,
    learned: Tensor | None = None,
) -> Tensor:
    """Return the positions that this forward commits, bool ``[rows, length]`` on the CPU.

    Args:
        blocks: the rows' blocks; ``passes`` counts the forwards before this one.
        masked: bool ``[rows, length]``, the undecided positions.
        confidence: float ``[rows, length]``, the chosen token's probability.
        entropy: float ``[rows, length]``, nats; needed if :func:`needed` says so.
        learned: float ``[rows, length]``, the learned sampler's scores; needed if :func:`needed` says so.
    """
    committed = torch.zeros_like(masked)
    by_policy: dict[str, list[int]] = {}
    for row, block in enumerate(blocks):
        if block.rule.max_steps is not None and block.passes + 1 >= block.rule.max_steps:
            committed[row] = masked[row]
        else:
            by_policy.setdefault(block.rule.policy, []).append(row)
    for name, rows in by_policy.items():
        own = [blocks[row] for row in rows]
        committed[rows] = POLICIES[name].select(
            Rows(
                masked[rows],
                confidence[rows],
                None if entropy is None else entropy[rows],
                None if learned is None else learned[rows],
                [block.rule.values for block in own],
                [block.passes for block in own],
                [block.rule.max_steps for block in own],
            )
        )
    return committed


def needed(blocks: Sequence[Block]) -> frozenset[Need]:
    """Return what the blocks' policies judge besides confidence."""
    return frozenset[Need]().union(*(POLICIES[block.rule.policy].needs for block in blocks))


def needs_logits(block: Block) -> bool:
    """Whether a forward over a block needs more than the most probable tokens: it samples, ranks candidates, or judges
    distributions.
    """
    return block.choice is not None or block.ranked > 0 or bool(needed([block]))
