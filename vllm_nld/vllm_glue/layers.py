"""Uses of vLLM's layers."""

from __future__ import annotations

import inspect
from typing import Any

from vllm_nld.errors import NLDError
from vllm_nld.vllm_glue.versions import SUPPORTED


def unscaled_rope(head_dim: int, max_position: int, rope_parameters: dict[str, Any]) -> Any:
    """Return vLLM's rotary embedding for NLD: YaRN's frequencies, but no attention factor.

    vLLM 0.32 reads ``attention_factor``, which the config class sets; 0.26 ignores it and reads ``apply_yarn_scaling``.

    Raises:
        NLDError: this vLLM scales queries and keys anyway.
    """
    from vllm.model_executor.layers.rotary_embedding import get_rope

    parameters = {**rope_parameters, "apply_yarn_scaling": False}
    rope = get_rope(head_dim, max_position=max_position, rope_parameters=parameters)
    if getattr(rope, "mscale", 1.0) != 1.0:
        raise NLDError(f"this vLLM's YaRN applies an attention factor of {rope.mscale}; supported vLLM: {SUPPORTED}")
    return rope


def ungathered_logits(model: Any, hidden_states: Any) -> Any:
    """Return a rank's own columns of the logits, with padding; None if this vLLM can only gather them."""
    processor = model.logits_processor
    if "skip_gather" not in inspect.signature(processor.forward).parameters:
        return None
    return processor(model.lm_head, hidden_states, skip_gather=True)
