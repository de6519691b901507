"""``mm_processor_kwargs``, the options that an engine or a request may give for its images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_nld.config import NemotronLabsDiffusionVLMConfig
from vllm_nld.errors import NLDError, shown
from vllm_nld.vision.images import MAX_IMAGE_SIZE

KEY = "max_image_size"
"""Pixels of the longer side that a larger image shrinks to."""


def image_size_limit(
    options: Mapping[str, Any] | None, config: NemotronLabsDiffusionVLMConfig, limit: int | None = None
) -> int:
    """Return the pixels that an image's longer side shrinks to.

    Args:
        options: ``mm_processor_kwargs``.
        config: of the model, whose tower has positions for ``vision_config.image_size`` pixels.
        limit: what an engine allows its requests, and what they have by default; None for an engine's own options.

    Raises:
        NLDError: the options are not suitable.
    """
    options = options or {}
    cell, largest = config.image_cell, limit or config.vision_config.image_size // config.image_cell * config.image_cell
    unknown = [key for key in options if key != KEY]
    if unknown:
        raise NLDError(f"mm_processor_kwargs: unknown key {shown(unknown[0])}; allowed: {KEY}")
    size = options.get(KEY, limit or min(MAX_IMAGE_SIZE, largest))
    if isinstance(size, bool) or not isinstance(size, int) or not cell <= size <= largest:
        raise NLDError(f"mm_processor_kwargs.{KEY}={shown(size)}; allowed: {cell} to {largest} pixels")
    return size
