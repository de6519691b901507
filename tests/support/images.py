"""Pictures, prompts with pictures, and what a model of :func:`tests.support.models.small_vlm_config` should answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vllm_nld.config import NemotronLabsDiffusionVLMConfig
from vllm_nld.reference import ar_generate, linear_spec_generate, load_reference
from vllm_nld.reference import generate as diffuse
from vllm_nld.reference.generate import Generation
from vllm_nld.vision.images import grid_of, pixels_of, tokens_of

LONGEST = 224
"""Pixels that the tests' models see of a picture's longer side."""


def needs_images() -> None:
    """Skip a test where nothing could read images; ``tests/integration/test_torchvision.py`` fails there."""
    from vllm_nld.vllm_glue.image_requirements import why_no_images

    reason = why_no_images()
    if reason is not None:
        pytest.skip(reason)


def picture(seed: int, width: int = 100, height: int = 60) -> Image.Image:
    """A picture of colored squares of 20 pixels, unlike every other seed's."""
    cells = np.random.default_rng(seed).integers(0, 256, (-(-height // 20), -(-width // 20), 3), np.uint8)
    return Image.fromarray(cells.repeat(20, 0).repeat(20, 1)[:height, :width])


@dataclass
class Ask:
    """A prompt with one start token per picture."""

    ids: list[int]
    pictures: Sequence[Image.Image] = ()

    def as_prompt(self) -> dict[str, Any]:
        """Return it in vLLM's form."""
        if not self.pictures:
            return {"prompt_token_ids": self.ids}
        return {"prompt_token_ids": self.ids, "multi_modal_data": {"image": list(self.pictures)}}


class Oracle:
    """The dense reference of a checkpoint folder, asked in the engine's form."""

    def __init__(self, folder: Path, longest: int = LONGEST) -> None:
        self.model, self.longest = load_reference(folder), longest
        assert isinstance(self.model.config, NemotronLabsDiffusionVLMConfig)
        self.config = self.model.config

    def prompt(self, ask: Ask) -> tuple[list[int], list[torch.Tensor]]:
        """Return the prompt's tokens with those of the pictures, and the pictures' pixels."""
        cell, pictures, ids = self.config.image_cell, iter(ask.pictures), list[int]()
        for token in ask.ids:
            if token == self.config.image_start_token_id:
                size = next(pictures).size
                ids += tokens_of(grid_of(*size, self.longest, cell), self.config.image_token_ids)
            else:
                ids.append(token)
        return ids, [torch.from_numpy(pixels_of(own, self.longest, cell)) for own in ask.pictures]

    def answer(self, ask: Ask, mode: str, tokens: int = 24, **options: Any) -> list[int]:
        """Return what it says in a mode."""
        ids, _ = self.prompt(ask)
        return self.generation(ask, mode, tokens, **options).ids[len(ids) :]

    def generation(self, ask: Ask, mode: str, tokens: int = 24, **options: Any) -> Generation:
        """Return how it says it."""
        ids, pixels = self.prompt(ask)
        modes = {"ar": ar_generate, "self_speculation": linear_spec_generate, "diffusion": diffuse}
        return modes[mode](self.model, ids, tokens, images=pixels, **options)


def complete(llm: Any, asks: list[Ask], each: list[dict[str, Any]], tokens: int = 24, **params: Any) -> list[Any]:
    """Return vLLM's outputs for prompts in one batch, each with its own options under ``nld``; greedy by default."""
    from vllm import SamplingParams

    params = {"temperature": 0, "max_tokens": tokens, "detokenize": False} | params
    own = [SamplingParams(**params, extra_args={"nld": options}) for options in each]
    return list(llm.generate([ask.as_prompt() for ask in asks], own, use_tqdm=False))


def texts(outputs: list[Any]) -> list[list[int]]:
    """Return the outputs' new tokens."""
    return [list(output.outputs[0].token_ids) for output in outputs]
