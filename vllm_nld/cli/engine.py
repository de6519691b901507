"""Start vLLM inside the CLI's own process, quietly."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator
from typing import Any

from vllm_nld.names import SCHEDULER

PROPOSER = "vllm_nld.SelfSpeculation"


def prepare_environment() -> None:
    """Run the engine in this process, on all cores, without its log; variables that the user set are kept."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send everything written to file descriptor 1 to standard error: libraries log there, and JSON must stay clean."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


@contextlib.contextmanager
def engine(model: str, *, drafts: int | None = None, **settings: Any) -> Iterator[Any]:
    """Yield an ``LLM`` for one request at a time, and free it afterwards.

    Args:
        model: checkpoint folder.
        drafts: tokens to draft per cycle, 0 for the checkpoint's default; None for plain AR.
        settings: further arguments of ``LLM``.
    """
    speculative: dict[str, Any] | None = None
    if drafts is not None:
        speculative = {"model": PROPOSER} | ({"num_speculative_tokens": drafts} if drafts else {})
        # Always-on self-speculation is compared here; auto mode has its own benchmark.
        settings = {"additional_config": {"nld": {"mode": "self_speculation"}}} | settings
    with engine_with(model=model, max_num_seqs=1, speculative_config=speculative, **settings) as llm:
        yield llm


@contextlib.contextmanager
def engine_with(**settings: Any) -> Iterator[Any]:
    """Yield an ``LLM`` with these arguments, eager, with metrics and a small cache, and free it afterwards.

    With self-speculation on vLLM's first model runner, by its scheduler: commands measure parts of its proposer.
    """
    from vllm import LLM

    # A start asks for ten full garbage collections, and what was imported is never garbage: each would look through all
    # of it, for half a second. An engine's end takes it back.
    gc.freeze()
    if settings.get("speculative_config") is not None:
        settings = {"scheduler_cls": SCHEDULER} | settings

    llm = LLM(**({"enforce_eager": True, "kv_cache_memory_bytes": 1 << 28, "disable_log_stats": False} | settings))
    try:
        yield llm
    finally:
        stop(llm)


def stop(llm: Any) -> None:
    """Shut an engine down now; the garbage collector would do it while the next engine runs."""
    import torch
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    if torch.distributed.is_initialized():  # not every version of vLLM has cleaned up by then
        gc.collect()
        cleanup_dist_env_and_memory()
