"""vLLM's interface to :mod:`vllm_nld.vision.images`: images and a prompt become pixels and a longer prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageProcessorItems, ImageSize
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdateDetails,
)
from vllm.multimodal.processing.inputs import ProcessorInputs

from vllm_nld.config import NemotronLabsDiffusionVLMConfig
from vllm_nld.errors import NLDError, shown
from vllm_nld.vision.images import Grid, grid_of, pixels_of, tokens_of
from vllm_nld.vision.options import image_size_limit

IMAGE_START = "<|image_start|>"
"""What a chat template writes once per image."""


class ImageInfo(BaseProcessingInfo):  # type: ignore[misc]
    """What vLLM asks about a model's images."""

    @property
    def config(self) -> NemotronLabsDiffusionVLMConfig:
        config: NemotronLabsDiffusionVLMConfig = self.ctx.get_hf_config(NemotronLabsDiffusionVLMConfig)
        return config

    def longest(self, options: Mapping[str, object] | None = None) -> int:
        """Return the pixels that the longer side shrinks to.

        Args:
            options: a request's ``mm_processor_kwargs``, which may ask for less than the engine's.

        Raises:
            NLDError: they are not suitable.
        """
        own = image_size_limit(self.ctx.get_mm_config().mm_processor_kwargs, self.config)
        return image_size_limit(options, self.config, own)

    def grid(self, size: ImageSize, options: Mapping[str, object] | None = None) -> Grid:
        """Return an image's cells; options as for :meth:`longest`."""
        return grid_of(size.width, size.height, self.longest(options), self.config.image_cell)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Return that a prompt may have any number of images; ``--limit-mm-per-prompt`` limits them."""
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Return the tokens of the largest image."""
        return {"image": self.grid(ImageSize(self.longest(), self.longest())).tokens}


class DummyImages(BaseDummyInputsBuilder[ImageInfo]):  # type: ignore[misc]
    """The largest images, with which vLLM measures memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """Return no text: the processor makes the tokens itself."""
        return ""

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]) -> Any:
        """Return white squares."""
        side, count = self.info.longest(), mm_counts.get("image", 0)
        overrides = mm_options.get("image")
        return {"image": self._get_dummy_images(width=side, height=side, num_images=count, overrides=overrides)}


class ImageProcessor(BaseMultiModalProcessor[ImageInfo]):  # type: ignore[misc]
    """Turns images into pixels, and each image's start token into all of its tokens."""

    requires_tokenizer = False

    def get_dummy_inputs(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> ProcessorInputs:
        """Return a prompt of images only."""
        data = self.dummy_inputs.get_dummy_mm_data(seq_len, mm_counts, mm_options)
        return ProcessorInputs(
            prompt=[self.info.config.image_start_token_id] * mm_counts.get("image", 0),
            mm_data_items=self.info.parse_mm_data(data, validate=False),
        )

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        longest, cell = self.info.longest(hf_kwargs), self.info.config.image_cell
        dtype = self.info.ctx.model_config.dtype
        pixels = [pixels_of(as_picture(image), longest, cell) for image in hf_data["images"]]
        return BatchFeature({"pixel_values": [torch.from_numpy(own).to(dtype) for own in pixels]})

    def _get_mm_fields_config(self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Any) -> Mapping[str, Any]:
        return {"pixel_values": MultiModalFieldConfig.batched("image")}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        config = self.info.config

        def tokens_of_item(index: int) -> PromptUpdateDetails:
            size = mm_items.get_items("image", ImageProcessorItems).get_image_size(index)
            tokens = tokens_of(self.info.grid(size, hf_processor_mm_kwargs), config.image_token_ids)
            return PromptUpdateDetails.select_token_id(tokens, config.image_pad_token_id)

        start = [config.image_start_token_id]
        return [PromptReplacement(modality="image", target=start, replacement=tokens_of_item)]

    def _apply_prompt_updates(self, token_ids: list[int], mm_prompt_updates: Mapping[str, Any]) -> tuple[Any, Any]:
        """Say what is missing as a fault of the request, which it is; vLLM would call it one of the server."""
        images, start = len(mm_prompt_updates.get("image", ())), self.info.config.image_start_token_id
        if images > token_ids.count(start):
            raise NLDError(
                f"{images} image(s), but the prompt has {token_ids.count(start)} place(s) for one: {IMAGE_START} "
                f"(token {start}) is needed once per image. If a chat template left it out, start the server with "
                "--chat-template-content-format string"
            )
        applied: tuple[Any, Any] = super()._apply_prompt_updates(token_ids, mm_prompt_updates)
        return applied


def as_picture(image: Any) -> Image.Image:
    """Return an image in Pillow's form.

    Args:
        image: in Pillow's form, or a uint8 array or tensor ``[height, width, channels]`` or ``[channels, height,
            width]`` with three channels.

    Raises:
        NLDError: it is neither.
    """
    if isinstance(image, Image.Image):
        return image
    values = np.asarray(image)
    if values.dtype != np.uint8 or values.ndim != 3 or 3 not in (values.shape[0], values.shape[-1]):
        raise NLDError(
            f"image: an array of {values.dtype} {shown(list(values.shape))}; allowed: uint8 [height, width, 3] or "
            "[3, height, width], or a Pillow image"
        )
    return Image.fromarray(values if values.shape[-1] == 3 else values.transpose(1, 2, 0))
