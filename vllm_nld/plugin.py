"""vLLM's entry point (group ``vllm.general_plugins``), called once in every vLLM process."""

from __future__ import annotations

from typing import Any

from vllm_nld.vllm_glue import registration, reports, versions


def register() -> None:
    """Register config, model, engine hook and the proposer's default; idempotent.

    With an unsupported vLLM it logs one line and registers nothing, so that other models keep working.
    """
    import logging

    reason = versions.unsupported_reason()
    if reason is not None:
        logging.getLogger("vllm.nld").error(reason)
        return
    from vllm_nld import errors
    from vllm_nld.model import runners
    from vllm_nld.model.speculative_keys import check_speculative_keys
    from vllm_nld.names import PROPOSER_PATHS
    from vllm_nld.serving.report import Account

    errors.show_plainly()
    register_models()
    registration.check_and_fill_speculative_config(PROPOSER_PATHS, check_speculative_keys)
    registration.check_requests_at_admission(admit)
    reports.show_in_responses(Account)
    runners.install()


def register_models() -> None:
    """Register the text model and the one that reads images, with their configs and hooks; idempotent.

    Where vLLM itself serves one of the released names, that name stays its own, and the hook takes over on demand.
    """
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from vllm_nld import names
    from vllm_nld.config import NemotronLabsDiffusionConfig, NemotronLabsDiffusionVLMConfig
    from vllm_nld.model.engine_config import NLDEngineConfig, NLDVLMEngineConfig, install
    from vllm_nld.vllm_glue.image_requirements import why_no_images

    text = "vllm_nld.model:NLDForCausalLM"

    def register_images(name: str) -> None:
        registration.register_with_stand_in(name, "vllm_nld.model:NLDForConditionalGeneration", text, why_no_images)

    for released, own, config, hook, register_as in (
        (
            names.ARCHITECTURE,
            names.OWN_ARCHITECTURE,
            NemotronLabsDiffusionConfig,
            NLDEngineConfig,
            lambda name: ModelRegistry.register_model(name, text),
        ),
        (
            names.VLM_ARCHITECTURE,
            names.OWN_VLM_ARCHITECTURE,
            NemotronLabsDiffusionVLMConfig,
            NLDVLMEngineConfig,
            register_images,
        ),
    ):
        known = ModelRegistry.get_supported_archs()
        if own in known:
            continue
        upstream_serves = released in known
        register_as(own)
        if not upstream_serves:
            AutoConfig.register(config.model_type, config, exist_ok=True)
            register_as(released)
        install(hook, released, upstream_serves)


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
