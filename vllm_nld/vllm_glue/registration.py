"""Hooks into vLLM's registries and configuration, which the plugin installs in every vLLM process."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from vllm_nld.errors import NLDError
from vllm_nld.vllm_glue.versions import SUPPORTED


def model_config_hooks() -> dict[str, Any]:
    """Return vLLM's map from architecture to its ``verify_and_update_config`` class."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    hooks: dict[str, Any] = MODELS_CONFIG_MAP
    return hooks


def max_draft_tokens() -> int:
    """Return how many drafts per request vLLM's rejection sampler can verify."""
    from vllm.v1.sample.rejection_sampler import MAX_SPEC_LEN

    return int(MAX_SPEC_LEN)


def register_with_stand_in(architecture: str, model: str, stand_in: str, why_not: Callable[[], str | None]) -> None:
    """Register a model that can be imported only if ``why_not()`` returns None.

    Else vLLM is told what it asks about a model from ``stand_in``, so that the engine gets as far as the hook that says
    why. vLLM would report a model that it cannot import as several pages of traceback.

    Args:
        architecture: its name in ``config.json``.
        model: its class, as ``module:class``.
        stand_in: another class, which can be imported.
        why_not: asked in the first engine that wants the model.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models.registry import _LazyRegisteredModel

    substitute = _LazyRegisteredModel(*stand_in.split(":"))

    class WithStandIn(_LazyRegisteredModel):  # type: ignore[misc]
        def inspect_model_cls(self) -> Any:
            return super().inspect_model_cls() if why_not() is None else substitute.inspect_model_cls()

    ModelRegistry.models[architecture] = WithStandIn(*model.split(":"))


def check_and_fill_speculative_config(proposer_paths: tuple[str, ...], check: Callable[[Any], None]) -> None:
    """Call ``check(speculative_config)`` if it names this extension's proposer, and fill in a default.

    ``num_speculative_tokens`` defaults to the checkpoint's block length - 1: vLLM takes such a default only from a
    draft model's ``n_predict``, which a custom proposer lacks. Also, a config shows what the user set only before vLLM
    fills it in. So ``SpeculativeConfig.__post_init__`` is wrapped. Idempotent.
    """
    from vllm.config import SpeculativeConfig

    original = SpeculativeConfig.__post_init__
    if getattr(original, "fills_nld_default", False):
        return

    @functools.wraps(original)
    def fill_then_check(self: Any, *args: Any) -> None:
        if self.model in proposer_paths:
            check(self)
        if self.model in proposer_paths and self.num_speculative_tokens is None:
            if not hasattr(self, "target_model_config"):
                raise NLDError("this vLLM's SpeculativeConfig has no target_model_config; pass num_speculative_tokens")
            block_length = getattr(self.target_model_config.hf_config, "block_size", None)
            if block_length:
                self.num_speculative_tokens = min(block_length - 1, max_draft_tokens())
        original(self, *args)

    fill_then_check.fills_nld_default = True  # type: ignore[attr-defined]
    SpeculativeConfig.__post_init__ = fill_then_check


def check_requests_at_admission(check: Callable[[Any, Any], None]) -> None:
    """Have ``check(vllm_config, sampling_params)`` called for every request before vLLM accepts it.

    vLLM has no hook for that while speculation is on: it then refuses custom logits processors, whose
    ``validate_params`` would be one. So ``InputProcessor.process_inputs`` is wrapped. An :class:`NLDError` becomes
    vLLM's own validation error, which the OpenAI server answers with HTTP 400. Idempotent.

    Raises:
        NLDError: ``process_inputs`` has no argument ``params``.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    original = InputProcessor.process_inputs
    if getattr(original, "checks_nld_requests", False):
        return
    signature = inspect.signature(original)
    if "params" not in signature.parameters:
        raise NLDError(f"vllm.v1.engine.input_processor.process_inputs changed; supported vLLM: {SUPPORTED}")

    @functools.wraps(original)
    def check_then_process(self: Any, *args: Any, **kwargs: Any) -> Any:
        params = signature.bind_partial(self, *args, **kwargs).arguments.get("params")
        try:
            check(self.vllm_config, params)
        except NLDError as error:
            raise VLLMValidationError(str(error)) from error
        return original(self, *args, **kwargs)

    check_then_process.checks_nld_requests = True  # type: ignore[attr-defined]
    InputProcessor.process_inputs = check_then_process
