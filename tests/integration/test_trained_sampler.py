"""The learned sampler of ``tiny``, as it was trained: on held-out text it beats the model's confidence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from vllm_nld.checkpoints import checkpoint_path
from vllm_nld.checkpoints.held_out import held_out_prompts
from vllm_nld.draft_pass.learned_sampler import LearnedSampler, statistics
from vllm_nld.reference import KVCache, ReferenceModel, load_reference

FOLDER = checkpoint_path("tiny") / "learned_sampler"


@dataclass
class HeldOut:
    """Blocks of 16 after held-out text, filled by serial denoising, and its states on the way."""

    model: ReferenceModel
    cache: KVCache
    empty: Tensor
    serial: Tensor
    states: list[tuple[Tensor, Tensor]]
    """Tokens and logits, in order."""

    def fill(self, score_of: Callable[[Tensor, Tensor, Tensor], Tensor], threshold: float) -> tuple[float, float]:
        """Return the share of serial denoising's tokens, and the mean number of forwards."""
        blocks, forwards = self.empty.clone(), 0
        while (masked := blocks == self.model.config.mask_token_id).any():
            logits = self.model.bidirectional(blocks, self.cache)
            chosen = surest(logits, masked) | (masked & (score_of(logits, blocks, masked) >= threshold))
            blocks = torch.where(chosen, logits.argmax(-1), blocks)
            forwards += int(masked.any(1).sum())
        return float((blocks == self.serial)[:, 1:].float().mean()), forwards / len(blocks)


def surest(logits: Tensor, masked: Tensor) -> Tensor:
    confidence = logits.softmax(-1).amax(-1).masked_fill(~masked, -1.0)
    return torch.nn.functional.one_hot(confidence.argmax(1), masked.shape[1]).bool() & masked


@pytest.fixture(scope="module")
def held_out() -> HeldOut:
    from tokenizers import Tokenizer

    model = load_reference(checkpoint_path("tiny"))
    tokenizer = Tokenizer.from_file(str(checkpoint_path("tiny") / "tokenizer.json"))
    mask_id = model.config.mask_token_id
    ids = [tokenizer.encode(text, add_special_tokens=False).ids[:96] for _, text in held_out_prompts(16)]
    prefixes, cache = torch.tensor([row for row in ids if len(row) == 96]), KVCache()
    with torch.inference_mode():
        seeds = model.causal(prefixes, cache)[:, -1].argmax(-1, keepdim=True)
        empty = torch.cat((seeds, torch.full((len(seeds), 15), mask_id)), dim=1)
        blocks, seen = empty, []
        while (masked := blocks == mask_id).any():
            logits = model.bidirectional(blocks, cache)
            seen.append((blocks, logits))
            blocks = torch.where(surest(logits, masked), logits.argmax(-1), blocks)
    return HeldOut(model, cache, empty, blocks, seen)


def test_trained_sampler_beats_confidence_of_the_model(held_out: HeldOut) -> None:
    """Log loss of "the most probable token equals the result of serial denoising"."""
    sampler, losses = LearnedSampler.load(FOLDER), []
    for blocks, logits in held_out.states:
        masked = blocks == held_out.model.config.mask_token_id
        tokens = torch.where(masked, logits.argmax(-1), blocks)
        with torch.inference_mode():
            forecast = sampler(tokens, statistics(logits, masked, torch.ones_like(masked)), torch.ones_like(masked))
        right = (tokens == held_out.serial)[masked].float()
        for predicted in (logits.softmax(-1).amax(-1), forecast.right.sigmoid()):
            clamped = predicted[masked].clamp(1e-4, 1 - 1e-4)
            losses.append(torch.nn.functional.binary_cross_entropy(clamped, right, reduction="sum"))
    assert sum(losses[1::2]) < 0.95 * sum(losses[::2])


@torch.inference_mode()
def test_trained_sampler_is_faster_and_closer_to_serial_denoising(held_out: HeldOut) -> None:
    """An untrained sampler would fail, because it equals the confidence threshold, and a higher threshold is slower."""
    accuracy, forwards = held_out.fill(lambda logits, _, masked: logits.softmax(-1).amax(-1), 0.8)
    better, fewer = held_out.fill(LearnedSampler.load(FOLDER).scores, 0.85)
    assert better > accuracy + 0.02
    assert fewer < forwards - 0.5
