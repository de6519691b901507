"""The measured engines: this extension's, and plain vLLM with its defaults, on one shape."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

from gpu_check.check import Check

CAPTURED = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
"""Sizes of CUDA graphs. vLLM's own list is long, and each takes time. 32 tokens per request fit up to 32 requests."""


def speculative(check: Check) -> Any:
    """Return the engine with self-speculation, block of ``drafts + 1``; its start is a figure of the step."""
    from vllm_nld.cli.engine import PROPOSER

    return _engine(
        check,
        "speculative",
        speculative_config={"model": PROPOSER, "num_speculative_tokens": check.sizes.drafts},
        additional_config={"nld": {"mode": "self_speculation", "prompt_lookup": 0}},
    )


def second(check: Check) -> Any:
    """Return the engine with self-speculation on vLLM's second model runner, where there is one for this device."""
    from vllm_nld.cli.engine import PROPOSER

    return _engine(
        check,
        "second",
        scheduler_cls=None,
        speculative_config={"model": PROPOSER, "num_speculative_tokens": check.sizes.drafts},
        additional_config={"nld": {"mode": "self_speculation"}},
    )


def plain(check: Check) -> Any:
    """Return plain vLLM on the same weights, with its default runner and asynchrony."""
    return _engine(check, "plain")


def core(llm: Any) -> Any:
    """Return vLLM's engine core, which runs in this process."""
    return llm.llm_engine.engine_core.engine_core


def worker(llm: Any) -> Any:
    """Return the worker of such an engine."""
    return core(llm).model_executor.driver_worker.worker


def runner(llm: Any) -> Any:
    """Return its model runner."""
    return worker(llm).model_runner


def _engine(check: Check, name: str, **settings: Any) -> Any:
    from vllm_nld.cli.engine import engine_with

    settings = _model(check) | settings
    heard = Warnings()
    logging.getLogger("vllm").addHandler(heard)
    try:
        llm, seconds = check.engines.get((name, check.step.shape), lambda: engine_with(**settings))
    finally:
        logging.getLogger("vllm").removeHandler(heard)
    if seconds:
        check.figure("engine start", seconds, "s", of=name, shape=check.step.shape)
        for text in heard.texts:
            check.figure("warning", text, of=name)
    return llm


def _model(check: Check) -> dict[str, Any]:
    """Return the arguments that every engine of a shape shares."""
    from vllm_nld.checkpoints import checkpoint_path
    from vllm_nld.cli.dummy import DUMMY_SETTINGS, dummy_config

    common: dict[str, Any] = {"skip_tokenizer_init": True, "enable_prefix_caching": False, "seed": 0}
    if check.dry:
        few = {"max_model_len": 512, "max_num_seqs": check.sizes.crowd, "kv_cache_memory_bytes": 1 << 25}
        # Many CPUs only emulate bfloat16.
        return common | {"model": str(checkpoint_path("tiny")), "dtype": "float32", "load_format": "dummy"} | few
    folder = check.scratch / check.step.shape
    dummy_config(check.step.shape).save_pretrained(folder)
    return common | DUMMY_SETTINGS | {
        "model": str(folder),
        "max_model_len": 4096,
        "max_num_seqs": check.sizes.crowd,
        "enforce_eager": False,
        "kv_cache_memory_bytes": None,  # as in normal use, vLLM profiles
        "gpu_memory_utilization": 0.6,
        "compilation_config": {"cudagraph_capture_sizes": CAPTURED},
    }  # fmt: skip


class Warnings(logging.Handler):
    """Collects the warnings of a logger."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the text."""
        with contextlib.suppress(Exception):
            self.texts.append(record.getMessage()[:500])
