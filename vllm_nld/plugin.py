"""vLLM's entry point (group ``vllm.general_plugins``), called once in every vLLM process."""

from __future__ import annotations

from typing import Any

from vllm_nld.names import ARCHITECTURE, MODEL_TYPE
from vllm_nld.vllm_glue import registration, versions


def register() -> None:
    """Register config, model, engine hook and the proposer's default; idempotent.

    With an unsupported vLLM it logs one line and registers nothing, so that other models keep working.
    """
    import logging

    reason = versions.unsupported_reason()
    if reason is not None:
        logging.getLogger("vllm.nld").error(reason)
        return
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from vllm_nld import errors
    from vllm_nld.config import NemotronLabsDiffusionConfig
    from vllm_nld.model import engine_config, runners
    from vllm_nld.model.speculative_keys import check_speculative_keys
    from vllm_nld.names import OWN_ARCHITECTURE, PROPOSER_PATHS

    errors.show_plainly()
    own = ModelRegistry.get_supported_archs()
    upstream_serves = ARCHITECTURE in own and OWN_ARCHITECTURE not in own
    model = "vllm_nld.model:NLDForCausalLM"
    if OWN_ARCHITECTURE not in own:
        ModelRegistry.register_model(OWN_ARCHITECTURE, model)
        if not upstream_serves:
            AutoConfig.register(MODEL_TYPE, NemotronLabsDiffusionConfig, exist_ok=True)
            ModelRegistry.register_model(ARCHITECTURE, model)
        engine_config.install(upstream_serves)
    registration.check_and_fill_speculative_config(PROPOSER_PATHS, check_speculative_keys)
    registration.check_requests_at_admission(admit)
    runners.install()


def admit(vllm_config: Any, params: Any) -> None:
    """Check a request before its engine gets it. The first one of an engine with self-speculation starts its metrics.

    Raises:
        NLDError: the request is not suitable.
    """
    from vllm_nld.serving.admission import check_admission

    traits = check_admission(vllm_config, params)
    if traits is not None and traits.block_length is not None:
        from vllm_nld.serving.collector import serve_metrics

        serve_metrics(vllm_config)
