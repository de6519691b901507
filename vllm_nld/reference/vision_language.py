"""The vision-language model, dense: the text model with image embeddings at the placeholders of its prompt."""

from __future__ import annotations

from collections.abc import Sequence

from typing import Any

import torch
from torch import Tensor

from vllm_nld.reference.model import ReferenceModel
from vllm_nld.reference.vision import Projector, VisionTower

IMAGE_PAD = 19


class ReferenceVLM(ReferenceModel):
    """Dense NLD vision-language model whose parameter names are the released tensor names.

    Images are part of the prompt, which is prefilled causally as text is. All later calls see them in the cache, so
    nothing else is different from the text model.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.encoder.vision_tower = VisionTower(config.vision_config)
        self.encoder.multi_modal_projector = Projector(config)

    def image_features(self, pixels: Tensor) -> Tensor:
        """Return ``[images, cells, hidden]``, row by row, for normalized pixels ``[images, 3, height, width]``.

        All images have one size, of whole cells in both directions.
        """
        features: Tensor = self.encoder.multi_modal_projector(self.encoder.vision_tower(pixels))
        return features

    def embed(self, ids: Tensor, images: Sequence[Tensor] = ()) -> Tensor:
        features = [self.image_features(pixels[None])[0] for pixels in images]
        return self.embed_features(ids, torch.cat(features)) if features else super().embed(ids)

    def embed_features(self, ids: Tensor, features: Tensor) -> Tensor:
        """Return embeddings ``[batch, tokens, hidden]`` of ``ids``, with ``features`` in the places of image pads.

        Args:
            ids: int64 ``[batch, tokens]``.
            features: ``[cells, hidden]`` of all images, in the order of the pads.

        Raises:
            ValueError: the number of pads is another.
        """
        pads = ids == IMAGE_PAD
        if int(pads.sum()) != len(features):
            raise ValueError(f"the prompt has {int(pads.sum())} image pads, but its images have {len(features)} cells")
        embedded = super().embed(ids)
        return embedded.masked_scatter(pads[..., None], features.to(embedded.dtype))
