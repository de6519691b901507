"""Refuses engine options at start-up under which self-speculation would be wrong or lossy."""

from __future__ import annotations

from typing import Any

from vllm_nld.errors import NLDError
from vllm_nld.vllm_glue import workers

LOSSLESS = "standard"
"""The only ``rejection_sample_method`` that gives the target's text and that vLLM's V1 runner implements."""


def check_speculation_can_be_right(vllm_config: Any) -> None:
    """Refuse options that a draft pass, or the verification of its drafts, does not work with.

    Raises:
        NLDError: the message names the option.
    """
    _check_runner(vllm_config.model_config)
    _check_context_parallel(vllm_config.parallel_config)
    _check_micro_batches(vllm_config.parallel_config)
    _check_verification(vllm_config.speculative_config)
    _check_connector(vllm_config.kv_transfer_config)


def _check_runner(model_config: Any) -> None:
    if model_config.runner_type != "generate":
        raise NLDError(
            f"runner={model_config.runner_type!r} with a speculative_config: such an engine generates no text that "
            "could be drafted; use runner='generate', or leave speculative_config out"
        )


def _check_context_parallel(parallel_config: Any) -> None:
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        size = getattr(parallel_config, name, 1)
        if size > 1:
            raise NLDError(
                f"{name}={size} with self-speculation: a draft reads a request's whole prefix, of which a rank then "
                f"holds a part; use {name}=1 (tensor_parallel_size is supported)"
            )


def _check_micro_batches(parallel_config: Any) -> None:
    for name, off, allowed in (("enable_dbo", 0, "False"), ("ubatch_size", 1, "0 or 1")):
        value = getattr(parallel_config, name, off)
        if value > off:
            raise NLDError(
                f"{name}={value} with self-speculation: a draft reads the block table of a whole step, of which vLLM "
                f"then makes one per micro-batch; allowed: {allowed}"
            )


def _check_verification(speculative_config: Any) -> None:
    method = getattr(speculative_config, "rejection_sample_method", LOSSLESS)
    if method != LOSSLESS:
        raise NLDError(
            f"speculative_config.rejection_sample_method={method!r}: self-speculation verifies without loss; "
            f"allowed: {LOSSLESS!r}"
        )


def _check_connector(kv_transfer_config: Any) -> None:
    if kv_transfer_config is None or kv_transfer_config.kv_connector is None:
        return
    if workers.transfers_layer_by_layer(kv_transfer_config):
        raise NLDError(
            f"kv_transfer_config.kv_connector={kv_transfer_config.kv_connector!r} with self-speculation: it loads or "
            "saves layer by layer, inside every forward, also a draft's, which has nothing to save; allowed: "
            "connectors that transfer between forwards, as OffloadingConnector does"
        )
