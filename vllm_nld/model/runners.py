"""Which of vLLM's two model runners an engine with self-speculation uses, and the parts of ours that go with it.

vLLM's second runner serves it wherever vLLM would take that runner for the model. What self-speculation lacks there has
the engine take the first, as vLLM does for what it lacks itself (``docs/operate/runners.md``).
"""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger

from vllm_nld.names import ASYNC_SCHEDULER, PROPOSER_PATHS, SCHEDULER, SECOND_SCHEDULER
from vllm_nld.options import NLDOptions
from vllm_nld.vllm_glue import scheduling, second_runner, workers

logger = init_logger("vllm.nld.runner")


def install() -> None:
    """Let vLLM choose between its runners for self-speculation; idempotent."""
    second_runner.allow_self_speculation(speculates, why_first)
    second_runner.allow_asynchronous_scheduling(speculates, why_first, settle)


def speculates(vllm_config: Any) -> bool:
    """Whether an engine uses this extension's self-speculation."""
    speculative = vllm_config.speculative_config
    return speculative is not None and speculative.model in PROPOSER_PATHS


def why_first(vllm_config: Any) -> list[str]:
    """Return what an engine asks for that self-speculation lacks on vLLM's second runner.

    An engine's processes ask again, with the first runner's worker and scheduler filled in. These are no reasons of
    their own, so they are named only where there is no other: then the user gave them.

    Raises:
        NLDError: the engine's options are unsuitable.
    """
    reasons = []
    if vllm_config.lora_config is not None:
        reasons.append("--enable-lora")
    defaults = NLDOptions.from_vllm_config(vllm_config)
    if defaults.draft_threshold > 0:
        reasons.append(f"draft_threshold={defaults.draft_threshold}")
    if defaults.branches == "auto":
        reasons.append(f"branches={defaults.branches!r}")
    if not defaults.seed_first:
        reasons.append("seed_first=False")
    filled_in = (*workers.WORKERS.values(), SCHEDULER) if reasons else ()
    worker, scheduler = vllm_config.parallel_config.worker_cls, vllm_config.scheduler_config.scheduler_cls
    known = ("auto", *workers.SECOND_WORKERS.values(), *filled_in)
    if worker not in known and not workers.is_for_second_runner(worker):
        reasons.append(f"worker_cls={worker!r}")
    if scheduler not in (None, *filled_in) and not scheduling.is_for_second_runner(scheduler):
        reasons.append(f"scheduler_cls={scheduler!r}")
    return [f"{reason} with self-speculation" for reason in reasons]


def settle(vllm_config: Any, reasons: list[str]) -> None:
    """Choose the scheduler of an engine on the second runner, and say which runner it is, and why."""
    scheduler = vllm_config.scheduler_config
    if vllm_config.use_v2_model_runner and scheduler.scheduler_cls in (None, ASYNC_SCHEDULER, SECOND_SCHEDULER):
        scheduler.scheduler_cls = ASYNC_SCHEDULER if scheduler.async_scheduling else SECOND_SCHEDULER
    logger.info_once("Model runner: %s", second_runner.describe(vllm_config, reasons))
