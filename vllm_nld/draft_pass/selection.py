"""Which masked positions of a block a forward commits: the selection policies of block diffusion.

Every policy commits at least one position per forward. Positions are ranked with ties in favour of the left one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_nld.draft_pass.block import Block, CommitRule


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
        entropy: float ``[rows, length]``, nats; needed if a row's sampler is ``entropy_budget``.
        learned: float ``[rows, length]``, the learned sampler's scores, 1 where a commit should change nothing; needed
            if a row's sampler is ``learned``.
    """
    committed = torch.zeros_like(masked)
    by_rule: dict[str, list[int]] = {}
    for row, block in enumerate(blocks):
        last = block.rule.max_steps is not None and block.passes + 1 >= block.rule.max_steps
        by_rule.setdefault("all" if last else block.rule.sampler, []).append(row)
    for name, rows in by_rule.items():
        rules = [blocks[row].rule for row in rows]
        if name == "all":
            committed[rows] = masked[rows]
        elif name == "confidence_threshold":
            committed[rows] = _above(rules, masked[rows], confidence[rows], confidence[rows])
        elif name == "learned":
            assert learned is not None
            committed[rows] = _above(rules, masked[rows], confidence[rows], learned[rows])
        elif name == "entropy_budget":
            assert entropy is not None
            committed[rows] = _within_budget(rules, masked[rows], entropy[rows])
        else:
            positions = -torch.arange(masked.shape[1], dtype=torch.float32).expand(len(rows), -1)
            order = confidence[rows] if name == "top_k" else positions
            quotas = [blocks[row].rule.quota(int(masked[row].sum()), blocks[row].passes) for row in rows]
            committed[rows] = masked[rows] & (_ranks(masked[rows], order) < torch.tensor(quotas)[:, None])
    return committed


def _above(rules: list[CommitRule], masked: Tensor, confidence: Tensor, score: Tensor) -> Tensor:
    """Positions whose score reaches the threshold, and the one of highest confidence: serial denoising's choice."""
    thresholds = torch.tensor([rule.threshold for rule in rules])[:, None]
    return masked & ((score >= thresholds) | (_ranks(masked, confidence) == 0))


def _within_budget(rules: list[CommitRule], masked: Tensor, entropy: Tensor) -> Tensor:
    """The longest prefix, by ascending entropy, whose sum without its largest member is within the budget."""
    ranks = _ranks(masked, -entropy)
    ascending = torch.zeros_like(entropy).scatter_(1, ranks, entropy.masked_fill(~masked, 0.0))
    # The largest member of a prefix in ascending order is its last, so this is the sum of those before it.
    before = (ascending.cumsum(1) - ascending).gather(1, ranks)
    budgets = torch.tensor([rule.entropy_budget for rule in rules])[:, None]
    return masked & ((before <= budgets) | (ranks == 0))


def _ranks(masked: Tensor, score: Tensor) -> Tensor:
    """Return each masked position's rank by descending score, int64 ``[rows, length]``; the others come last."""
    order = score.masked_fill(~masked, -torch.inf).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(score.shape[1]).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def needs_logits(block: Block) -> bool:
    """Whether a forward over a block needs more than the most probable tokens: it samples, or judges distributions."""
    return block.choice is not None or block.rule.sampler in ("entropy_budget", "learned")
