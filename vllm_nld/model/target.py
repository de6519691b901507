"""How a draft calls the target: as vLLM's runners do, because the compiled graph knows no other way.

vLLM drops all guards of a compiled model, so a graph that was traced for embeddings would misread token ids.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def text_model(target: Any) -> Any:
    """Return the text model of a target, which is the target itself if it reads no images."""
    return target.get_language_model() if hasattr(target, "multi_modal_projector") else target


def is_called_with_embeddings(model_config: Any) -> bool:
    """Whether vLLM's runners embed the tokens themselves, which they do for images and for prompts of embeddings."""
    # Versions that lack the first one have no model here that reads images.
    return bool(getattr(model_config, "supports_multimodal_inputs", False) or model_config.enable_prompt_embeds)


def last_hidden(model: Any, ids: Tensor, positions: Tensor, embeds: bool) -> Tensor:
    """Run the model and return its last layer's output ``[tokens, hidden]``.

    Args:
        model: a :func:`text_model`.
        ids: int32 ``[tokens]``.
        positions: int64 ``[tokens]``.
        embeds: whether it :func:`is_called_with_embeddings`. A draft adapter's mask row then depends on the forward's
            metadata, so the forward context must be set.
    """
    if embeds:
        embedded = model.embed_input_ids(ids)
        hidden: Tensor = model(input_ids=None, positions=positions, inputs_embeds=embedded)
    else:
        hidden = model(input_ids=ids, positions=positions)
    return hidden
