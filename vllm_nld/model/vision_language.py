"""The NLD network that reads images: vLLM's Mistral-3 tower and projector before this extension's text model.

Importing this needs torchvision, which vLLM's part imports (:mod:`vllm_nld.vllm_glue.image_requirements`).
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.mistral3 import Mistral3ForConditionalGeneration
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_nld.model.image_processor import IMAGE_START, DummyImages, ImageInfo, ImageProcessor
from vllm_nld.model.network import NLDForCausalLM


@MULTIMODAL_REGISTRY.register_processor(ImageProcessor, info=ImageInfo, dummy_inputs=DummyImages)
class NLDForConditionalGeneration(Mistral3ForConditionalGeneration):  # type: ignore[misc]
    """NLD with images. The text model inside, which also drafts, is an :class:`NLDForCausalLM`."""

    supports_mm_device_do_normalize = False  # the processor hands over normalized pixels
    hf_to_vllm_mapper = WeightsMapper(
        # In this order: names that the first ones have changed do not fit the third. Without a dot at the end, because
        # a quantization's list of modules to skip names the modules themselves.
        orig_to_new_prefix={
            "encoder.vision_tower": "vision_tower",
            "encoder.multi_modal_projector": "multi_modal_projector",
            "encoder.": "language_model.model.",
            "diffusion_head": "language_model.lm_head",
        }
    )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """Return what marks an image where the chat template is handed plain text."""
        return IMAGE_START if modality.startswith("image") else None

    @classmethod
    def get_model_state_cls(cls) -> type[Any]:
        """Return what vLLM's second runner keeps next to the model."""
        return NLDForCausalLM.get_model_state_cls()
