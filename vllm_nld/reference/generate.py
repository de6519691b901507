"""AR and linear self-speculation, one request at a time, on the dense model (block diffusion: ``diffusion.py``).

Names and counting follow the released remote code. NFE counts model forwards; each docstring says whether the prefill
counts. Deliberate deviations from the released code:

- the mask token is excluded from every argmax and every sample (so ``threshold`` > 0 always makes progress);
- the output never exceeds ``max_new_tokens``, and the last block shrinks instead of overshooting;
- a spent thinking budget puts ``end_think_token_id`` into both output and context, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_nld.reference.model import KVCache, ReferenceModel


@dataclass
class ThinkingBudget:
    """Forces the end-of-thinking token once, after ``limit`` generated tokens, unless it was generated before."""

    limit: int | None = None
    end_token: int | None = None

    def forces(self, generated: list[int], offset: int = 0) -> bool:
        """Whether the token after ``generated`` (and ``offset`` undecided ones) must be the end token."""
        if self.limit is None or self.end_token is None:
            return False
        return len(generated) + offset >= self.limit and self.end_token not in generated


@dataclass
class Generation:
    """Result of a method.

    Attributes:
        ids: prompt and generated token ids.
        nfe: number of forwards, counted as the method's docstring says.
        drafts: self-speculation only, the drafted block of each cycle, with its seed as first token.
        accepted: self-speculation only, tokens emitted by each cycle (matches + 1), before clipping.
    """

    ids: list[int]
    nfe: int
    drafts: list[list[int]] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)


def pick(logits: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """Return token ids ``[rows]`` from logits ``[rows, vocab]``: argmax at temperature 0, else a sample."""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator).squeeze(-1)


@torch.inference_mode()
def ar_generate(
    model: ReferenceModel,
    prompt_ids: list[int],
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    eos_token_id: int | None = None,
    max_thinking_tokens: int | None = None,
    end_think_token_id: int | None = None,
    generator: torch.Generator | None = None,
    images: Sequence[Tensor] = (),
) -> Generation:
    """Causal decoding, one token per forward. NFE equals the generated tokens; the prefill is not counted.

    Args:
        images: of the prompt, see :meth:`ReferenceModel.embed`.
    """
    eos, budget = eos_ids(model, eos_token_id), ThinkingBudget(max_thinking_tokens, end_think_token_id)
    cache, generated = KVCache(), list[int]()
    logits = prefill(model, prompt_ids, images, cache)
    while len(generated) < max_new_tokens:
        token = budget.end_token if budget.forces(generated) else int(pick(logits, temperature, generator))
        generated.append(int(token or 0))
        if generated[-1] in eos or len(generated) == max_new_tokens:
            break
        logits = model.causal(ids_tensor(model, generated[-1:]), cache)[0, -1:]
    return Generation(prompt_ids + generated, len(generated))


@torch.inference_mode()
def linear_spec_generate(
    model: ReferenceModel,
    prompt_ids: list[int],
    max_new_tokens: int = 128,
    block_length: int | None = None,
    temperature: float = 0.0,
    eos_token_id: int | None = None,
    max_thinking_tokens: int | None = None,
    end_think_token_id: int | None = None,
    threshold: float = 0.0,
    generator: torch.Generator | None = None,
    images: Sequence[Tensor] = (),
) -> Generation:
    """Linear self-speculation: draft a block bidirectionally (with the draft adapter, if any), verify it causally.

    NFE counts the prefill (1), every draft forward and every verify forward, as the released code does.

    Args:
        threshold: 0 fills the whole block in one draft forward; above 0 a draft forward commits the positions at
            least this probable (and always the best one), until the block is full.
        images: of the prompt, see :meth:`ReferenceModel.embed`.
    """
    block_length = block_length or model.config.block_size
    eos, budget = eos_ids(model, eos_token_id), ThinkingBudget(max_thinking_tokens, end_think_token_id)
    cache = KVCache()
    logits = prefill(model, prompt_ids, images, cache)
    seed = int(budget.end_token or 0) if budget.forces([]) else int(pick(logits, temperature, generator))
    result = Generation([], nfe=1)
    generated = [seed]
    while seed not in eos and len(generated) < max_new_tokens:
        prefix = cache.length
        # A cycle emits at most block_length tokens. Near the end the block shrinks to the tokens that are left to emit.
        length = min(block_length, max_new_tokens - len(generated))
        block, forwards = draft_block(model, cache, seed, length, threshold, temperature, generator)
        verified = pick(model.causal(ids_tensor(model, block), cache)[0], temperature, generator).tolist()
        emitted: list[int] = []
        for row, token in enumerate(verified):
            emitted.append(int(budget.end_token or 0) if budget.forces(generated + emitted) else token)
            if row + 1 == length or emitted[-1] != block[row + 1]:
                break
        cache.crop(prefix + len(emitted))
        result.nfe += forwards + 1
        result.drafts.append(block)
        result.accepted.append(len(emitted))
        end = first_of(emitted, eos)
        generated += emitted if end is None else emitted[: end + 1]
        seed = generated[-1]
    result.ids = prompt_ids + generated
    return result


def draft_block(
    model: ReferenceModel,
    cache: KVCache,
    seed: int,
    length: int,
    threshold: float = 0.0,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[list[int], int]:
    """Return a drafted block of ``length`` tokens, seed first, and the number of draft forwards (adapter on)."""
    mask_id = model.config.mask_token_id
    block, forwards = [seed] + [mask_id] * (length - 1), 0
    while mask_id in block[1:]:
        logits = model.draft(ids_tensor(model, block), cache)[0]
        forwards += 1
        tokens = pick(logits, temperature, generator)
        tempered = logits / temperature if temperature else logits
        confidence = tempered.softmax(-1).gather(-1, tokens[:, None]).squeeze(-1).tolist()
        open_rows = [row for row in range(1, length) if block[row] == mask_id]
        best = max(open_rows, key=lambda row: confidence[row])
        for row in open_rows:
            if row == best or confidence[row] >= threshold:
                block[row] = int(tokens[row])
    return block, forwards


def prefill(model: ReferenceModel, prompt_ids: list[int], images: Sequence[Tensor], cache: KVCache) -> Tensor:
    """Fill ``cache`` with a prompt; returns the logits ``[1, vocab]`` of the first new token."""
    ids = ids_tensor(model, prompt_ids)
    logits = model.causal(ids, cache, model.embed(ids, images)) if images else model.causal(ids, cache)
    return logits[0, -1:]


def ids_tensor(model: ReferenceModel, ids: list[int]) -> Tensor:
    """Return token ids as int64 ``[1, tokens]`` on the model's device."""
    return torch.tensor([ids], device=model.diffusion_head.weight.device)


def eos_ids(model: ReferenceModel, eos_token_id: int | None) -> set[int]:
    """Return the end-of-sequence ids: the argument, else the config's (an id, a list, or none)."""
    eos = model.config.eos_token_id if eos_token_id is None else eos_token_id
    if eos is None:
        return set()
    return {eos} if isinstance(eos, int) else set(eos)


def first_of(tokens: list[int], wanted: set[int]) -> int | None:
    """Return the index of the first token that is in ``wanted``, or None."""
    return next((i for i, token in enumerate(tokens) if token in wanted), None)
