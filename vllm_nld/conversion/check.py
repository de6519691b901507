"""Comparing a converted checkpoint with its source by what both predict."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from vllm_nld.conversion.mask_token import MaskToken
from vllm_nld.errors import NLDError
from vllm_nld.reference import load_reference

TEXTS = (
    "The capital of France is Paris. The capital of Italy is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Q: A train leaves at 9:40 and arrives at 12:05. How long does it take?\nA: It takes",
)
RANDOM_TOKENS = 192
"""Length of one more prompt, of tokens drawn at random: the texts are short and have few different ones."""
TOLERANCE = 1e-3
"""Largest difference that float32 may make, as a share of the largest logit."""


@dataclass(frozen=True)
class Agreement:
    """How near the converted checkpoint is to its source, over all positions of some prompts, the mask token left out.

    Attributes:
        positions: compared.
        difference: largest between two logits, of the same weights, both computed in float32.
        largest: absolute logit, to judge it by.
        rounding: largest difference that rounding the source's weights to the checkpoint's dtype makes; 0 if none.
        same_best: positions at which that leaves the most probable token as it is.
    """

    positions: int
    difference: float
    largest: float
    rounding: float
    same_best: int


def prompts(folder: Path, mask: MaskToken, rows: int, longest: int) -> list[Tensor]:
    """Return the prompts to compare on, int64 ``[tokens]`` each, without the mask token."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = [torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids[:longest]) for text in TEXTS]
    drawn = torch.randint(0, rows, (min(RANDOM_TOKENS, longest),), generator=torch.Generator().manual_seed(0))
    kept = [ids[(ids != mask.id) & (ids < rows)].long() for ids in [*found, drawn]]
    return [ids for ids in kept if len(ids)]


@torch.inference_mode()
def source_logits(network: nn.Module, dtype: torch.dtype, ids: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the logits of the source as it is, and with its weights rounded to ``dtype``, which is done in place."""
    plain = [network(row) for row in ids]
    changed = False
    for parameter in network.parameters():
        rounded = parameter.to(dtype).to(parameter.dtype)
        changed = changed or not torch.equal(rounded, parameter)
        parameter.copy_(rounded)
    return plain, [network(row) for row in ids] if changed else plain


@torch.inference_mode()
def compare(folder: Path, plain: list[Tensor], rounded: list[Tensor], ids: list[Tensor], mask: MaskToken) -> Agreement:
    """Compare a written checkpoint with its source's logits.

    Raises:
        NLDError: they differ by more than float32 can explain.
    """
    model = load_reference(folder)
    difference, rounding, largest = 0.0, 0.0, 0.0
    positions = same = 0
    for before, wanted, row in zip(plain, rounded, ids, strict=True):
        others = torch.arange(wanted.shape[-1]) != mask.id
        found = model.causal(row[None])[0, :, : wanted.shape[-1]][:, others]
        before, wanted = before[:, others], wanted[:, others]
        difference = max(difference, _difference(found, wanted))
        rounding = max(rounding, _difference(before, wanted))
        largest = max(largest, float(wanted.abs().max()))
        same += int((before.argmax(-1) == wanted.argmax(-1)).sum())
        positions += len(row)
    if not difference <= TOLERANCE * max(1.0, largest):
        raise NLDError(
            f"the converted model does not compute what its source does: logits differ by up to {difference:.3g} "
            f"(largest: {largest:.3g}), allowed is {TOLERANCE:g} of that; nothing was written. Please report the model"
        )
    return Agreement(positions, difference, largest, rounding, same)


def _difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference; infinite if it is not a number."""
    difference = float((one - other).abs().max())
    return math.inf if math.isnan(difference) else difference
