"""Refuses keys of ``--speculative-config`` that have no effect here, instead of ignoring them.

vLLM has them for its own draft methods. Here the target model drafts for itself, so there is no draft model to set up,
and this extension's own options control how drafts are made.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from vllm_nld.errors import NLDError, shown

HONORED = ("model", "method", "num_speculative_tokens")
CHECKED_ELSEWHERE = ("rejection_sample_method", "synthetic_acceptance_rates", "synthetic_acceptance_length")
"""How drafts are accepted. Lossy values are refused together with the engine's other options."""
FILLED_BY_VLLM = ("target_model_config", "target_parallel_config", "draft_model_config", "draft_parallel_config")
METHODS = (None, "custom_class")

INSTEAD = {
    "attention_backend": "--attention-backend sets it for all passes",
    "code_revision": "--code-revision sets it for the model",
    "disable_padded_drafter_batch": "drafts are never padded",
    "draft_load_config": "--load-format sets it for the model",
    "draft_sample_method": '--additional-config \'{"nld": {"sampled_drafts": ...}}\' decides it',
    "draft_tensor_parallel_size": "drafts run on --tensor-parallel-size devices",
    "enforce_eager": "--enforce-eager sets it for all passes",
    "kv_cache_dtype": "--kv-cache-dtype sets it for all passes",
    "max_model_len": "--max-model-len sets it for all passes",
    "moe_backend": "the model has no experts",
    "num_speculative_tokens_per_batch_size": "mode auto, the default, chooses block lengths by load",
    "parallel_drafting": "a block is drafted in parallel anyway",
    "prompt_lookup_max": '--additional-config \'{"nld": {"prompt_lookup": ...}}\' sets how many tokens must match',
    "prompt_lookup_min": '--additional-config \'{"nld": {"prompt_lookup": ...}}\' sets how many tokens must match',
    "quantization": "--quantization sets it for the model",
    "revision": "--revision sets it for the model",
    "tensor_parallel_size": "drafts run on --tensor-parallel-size devices",
}


def check_speculative_keys(speculative: Any) -> None:
    """Refuse keys of vLLM's ``SpeculativeConfig`` that the user set without effect. Call it before vLLM fills it.

    A field that this extension does not know counts as one without effect.

    Raises:
        NLDError: the value of such a key is not its default.
    """
    if speculative.method not in METHODS:
        raise NLDError(
            f"speculative_config.method={shown(speculative.method)} with model={shown(speculative.model)}; "
            "allowed: leave method out"
        )
    for field in dataclasses.fields(speculative):
        if field.name in HONORED + CHECKED_ELSEWHERE + FILLED_BY_VLLM:
            continue
        value, default = getattr(speculative, field.name), default_of(field)
        # vLLM's own mark for "not used", in a copy of a config that was filled in.
        if value == default or (field.name.startswith("prompt_lookup") and value == 0):
            continue
        instead = INSTEAD.get(field.name, "the target model drafts for itself")
        raise NLDError(
            f"speculative_config.{field.name}={shown(value)} has no effect with self-speculation: {instead}; "
            f"allowed: leave it out"
        )


def default_of(field: Any) -> Any:
    """Return a dataclass field's default; vLLM writes some as pydantic's ``Field(default=...)``."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return getattr(field.default, "default", field.default)
