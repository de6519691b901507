"""The vision-language model, dense: the text model with image embeddings at the placeholders of its prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_nld.config import NemotronLabsDiffusionVLMConfig
from vllm_nld.reference.model import Encoder, ReferenceModel
from vllm_nld.reference.vision import Projector, VisionTower


class VisionLanguageEncoder(Encoder):
    """The text model's encoder, and the tower and the projector, which the released files keep in it."""

    def __init__(self, config: NemotronLabsDiffusionVLMConfig) -> None:
        super().__init__(config)
        self.vision_tower = VisionTower(config.vision_config)
        self.multi_modal_projector = Projector(config)


class ReferenceVLM(ReferenceModel):
    """Dense NLD vision-language model whose parameter names are the released tensor names.

    Images are part of the prompt, which is prefilled causally as text is. All later calls see them in the cache, so
    nothing else is different from the text model.
    """

    encoder: VisionLanguageEncoder

    def __init__(self, config: NemotronLabsDiffusionVLMConfig) -> None:
        super().__init__(config, VisionLanguageEncoder(config))

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
        pads = torch.eq(ids, self.config.image_pad_token_id)
        if int(pads.sum()) != len(features):
            raise ValueError(f"the prompt has {int(pads.sum())} image pads, but its images have {len(features)} cells")
        embedded = super().embed(ids)
        return embedded.masked_scatter(pads[..., None], features.to(embedded.dtype))
