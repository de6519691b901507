"""Block diffusion, one request at a time, on the dense model, with a plain version of every selection policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_nld.reference.generate import Generation, ThinkingBudget, eos_ids, first_of, ids_tensor, pick, prefill
from vllm_nld.reference.model import KVCache, ReferenceModel

if TYPE_CHECKING:
    from vllm_nld.draft_pass.learned_sampler import LearnedSampler


@dataclass(frozen=True)
class Policy:
    """How a denoising forward chooses the positions to commit; see :func:`generate` for the fields."""

    sampler: str = "confidence_threshold"
    threshold: float = 0.9
    tokens_per_step: int | None = None
    entropy_budget: float = 0.3
    max_steps: int | None = None
    learned: LearnedSampler | None = None


@torch.inference_mode()
def generate(
    model: ReferenceModel,
    prompt_ids: list[int],
    max_new_tokens: int = 128,
    block_length: int | None = None,
    threshold: float | None = None,
    temperature: float = 0.0,
    eos_token_id: int | None = None,
    max_thinking_tokens: int | None = None,
    end_think_token_id: int | None = None,
    generator: torch.Generator | None = None,
    *,
    sampler: str | None = None,
    tokens_per_step: int | None = None,
    entropy_budget: float = 0.3,
    max_denoising_steps: int | None = None,
    learned: LearnedSampler | None = None,
    seed_first: bool = True,
    images: Sequence[Tensor] = (),
) -> Generation:
    """Block diffusion. NFE counts every denoising forward and each block's causal commit, but not the prefill.

    A block that ends the text with its first token needs no commit, and none is counted.

    Args:
        threshold: for the samplers ``confidence_threshold`` and ``learned``. Without a ``sampler``, a number means
            ``confidence_threshold``, and None means ``top_k`` with an even share of the block per step over
            ``block_length`` steps, as in the released code.
        sampler: ``confidence_threshold`` commits every position at least this sure, ``top_k`` the few surest,
            ``left_to_right`` the few leftmost, ``entropy_budget`` the longest run in ascending order of entropy whose
            sum without its largest member is within the budget (nats), ``learned`` the positions that a trained
            predictor is sure of. Each commits at least one position per forward.
        tokens_per_step: positions that ``top_k`` and ``left_to_right`` commit; by default an even share over
            ``max_denoising_steps``, or 1.
        max_denoising_steps: most forwards per block. The last one commits all remaining positions.
        seed_first: the causal pass decides a block's first token; else that position is also denoised.
        images: of the prompt, see :meth:`ReferenceModel.embed`.
    """
    block_length = block_length or model.config.block_size
    if sampler is None:
        sampler = "top_k" if threshold is None else "confidence_threshold"
        max_denoising_steps = max_denoising_steps or (block_length if threshold is None else None)
    threshold = 0.9 if threshold is None else threshold
    policy = Policy(sampler, threshold, tokens_per_step, entropy_budget, max_denoising_steps, learned)
    eos, budget = eos_ids(model, eos_token_id), ThinkingBudget(max_thinking_tokens, end_think_token_id)
    cache, generated, nfe = KVCache(), list[int](), 0
    logits = prefill(model, prompt_ids, images, cache)
    while len(generated) < max_new_tokens:
        length = min(block_length, max_new_tokens - len(generated))
        first = int(pick(logits, temperature, generator)) if seed_first else model.config.mask_token_id
        block = [first] + [model.config.mask_token_id] * (length - 1)
        due = next((i for i in range(length) if budget.forces(generated, i)), None)
        if due is not None:
            block[due] = int(budget.end_token or 0)
        nfe += _denoise(model, cache, block, policy, temperature, eos, generator)
        end = first_of(block, eos)
        used = block if end is None else block[: end + 1]
        generated += used
        if len(used) > 1:
            logits = model.causal(ids_tensor(model, block), cache)[0, -1:]
            nfe += 1
        if end is not None:
            break
    return Generation(prompt_ids + generated, nfe)


def _denoise(
    model: ReferenceModel,
    cache: KVCache,
    block: list[int],
    policy: Policy,
    temperature: float,
    eos: set[int],
    generator: torch.Generator | None,
) -> int:
    """Fill the block's masks in place; returns the number of bidirectional forwards."""
    mask_id, forwards = model.config.mask_token_id, 0
    while mask_id in block:
        end = first_of(block, eos)
        if end is not None and mask_id not in block[:end]:
            break
        logits = model.bidirectional(ids_tensor(model, block), cache)[0]
        tokens = pick(logits, temperature, generator)
        for row in _chosen(block, mask_id, logits, tokens, policy, forwards):
            block[row] = int(tokens[row])
        forwards += 1
    return forwards


def _chosen(block: list[int], mask_id: int, logits: Tensor, tokens: Tensor, policy: Policy, forwards: int) -> list[int]:
    """Return the positions to commit after ``forwards`` earlier forwards of this block."""
    masked = [row for row, token in enumerate(block) if token == mask_id]
    if policy.max_steps is not None and forwards + 1 >= policy.max_steps:
        return masked
    probabilities = logits.softmax(-1)
    confidence = score = probabilities.gather(-1, tokens[:, None]).squeeze(-1).tolist()
    surest = sorted(masked, key=lambda row: -confidence[row])
    if policy.sampler == "learned":
        assert policy.learned is not None
        ids = torch.tensor([block], device=logits.device)
        score = policy.learned.scores(logits[None], ids, ids == mask_id)[0].tolist()
    if policy.sampler in ("confidence_threshold", "learned"):
        return [row for rank, row in enumerate(surest) if rank == 0 or score[row] >= policy.threshold]
    if policy.sampler == "entropy_budget":
        entropy = torch.special.entr(probabilities).sum(-1).tolist()
        run = sorted(masked, key=lambda row: entropy[row])
        spent = [sum(entropy[row] for row in run[:count]) for count in range(len(run))]
        return [row for row, before in zip(run, spent, strict=True) if row == run[0] or before <= policy.entropy_budget]
    if policy.sampler not in ("top_k", "left_to_right"):
        raise ValueError(f"the reference has no policy {policy.sampler!r}")
    share = policy.tokens_per_step
    if share is None:
        share = 1 if policy.max_steps is None else -(-len(masked) // (policy.max_steps - forwards))
    return (surest if policy.sampler == "top_k" else masked)[:share]
