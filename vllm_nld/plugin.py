"""vLLM's entry point (group ``vllm.general_plugins``), called once in every vLLM process."""

from __future__ import annotations

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

    from vllm_nld import engine_config, errors, request_options
    from vllm_nld.config import NemotronLabsDiffusionConfig

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
    compat.default_num_speculative_tokens(request_options.PROPOSER_PATHS)
    compat.check_requests_at_admission(request_options.check_admission)
