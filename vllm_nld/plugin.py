"""vLLM's entry point (group ``vllm.general_plugins``), called once in every vLLM process."""

from __future__ import annotations

from typing import Any

from vllm_nld import ARCHITECTURE, MODEL_TYPE, compat


def register() -> None:
    """Register config, model, engine hook and the proposer's default; idempotent.

    With an unsupported vLLM it logs one line and registers nothing, so that other models keep working.
    """
    import logging

    reason = compat.unsupported_reason()
    if reason is not None:
        logging.getLogger("vllm.nld").error(reason)
        return
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from vllm_nld import engine_config, errors
    from vllm_nld.config import NemotronLabsDiffusionConfig
    from vllm_nld.request_options import PROPOSER_PATHS
    from vllm_nld.speculative_keys import check_speculative_keys

    errors.show_plainly()
    own = ModelRegistry.get_supported_archs()
    upstream_serves = ARCHITECTURE in own and engine_config.OWN_ARCHITECTURE not in own
    model = "vllm_nld.model:NLDForCausalLM"
    if engine_config.OWN_ARCHITECTURE not in own:
        ModelRegistry.register_model(engine_config.OWN_ARCHITECTURE, model)
        if not upstream_serves:
            AutoConfig.register(MODEL_TYPE, NemotronLabsDiffusionConfig, exist_ok=True)
            ModelRegistry.register_model(ARCHITECTURE, model)
        engine_config.install(upstream_serves)
    compat.check_and_fill_speculative_config(PROPOSER_PATHS, check_speculative_keys)
    compat.check_requests_at_admission(admit)


def admit(vllm_config: Any, params: Any) -> None:
    """Check a request before its engine sees it; the first one of an engine with self-speculation opens its metrics.

    Raises:
        NLDError: the request is unsuitable.
    """
    from vllm_nld.request_options import check_admission

    traits = check_admission(vllm_config, params)
    if traits is not None and traits.block_length is not None:
        from vllm_nld.collector import serve_metrics

        serve_metrics(vllm_config)
