"""Uses of vLLM's scheduler for parking."""

from __future__ import annotations

import inspect
from typing import Any

from vllm_nld.names import SCHEDULER


def use_scheduler_subclass(scheduler_config: Any) -> None:
    """Choose the scheduler subclass for blocks without a fixed size, unless the user chose a scheduler."""
    if scheduler_config.scheduler_cls is None:
        scheduler_config.scheduler_cls = SCHEDULER


def schedules_blocks(scheduler_config: Any) -> bool:
    """Whether the engine uses this extension's scheduler, or a subclass."""
    chosen = scheduler_config.scheduler_cls
    if chosen is None:
        return False
    from vllm.utils.import_utils import resolve_obj_by_qualname

    chosen = resolve_obj_by_qualname(chosen) if isinstance(chosen, str) else chosen
    return bool(getattr(chosen, "schedules_blocks", False))


def parks_requests(vllm_config: Any) -> bool:
    """Whether the engine's scheduler leaves parked requests out of causal passes.

    Not with LoRAs: vLLM counts only those of the requests in a step, so a parked one would return on top of
    ``max_loras``.
    """
    plain = vllm_config.lora_config is None and parking_obstacle() is None
    return plain and schedules_blocks(vllm_config.scheduler_config)


def parking_obstacle() -> str | None:
    """Return the feature that this vLLM lacks for leaving requests out of a step, or None.

    vLLM has no extension point for that. 0.32 has its own mechanism, for decodes that are still in flight in a pipeline
    (``Request.next_decode_eligible_step``). Its ``DiffusionAsyncScheduler`` uses it in the same way.
    """
    import dataclasses

    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler

    source = inspect.getsource(Scheduler.schedule)
    if "self.current_step < request.next_decode_eligible_step" not in source:
        return "Scheduler.schedule does not look at Request.next_decode_eligible_step"
    if "preempted_req_ids" not in {field.name for field in dataclasses.fields(SchedulerOutput)}:
        return "SchedulerOutput has no preempted_req_ids"
    return None


def why_not_parked(vllm_config: Any) -> str:
    """Return what to change so that an engine that does not park requests will."""
    if vllm_config.lora_config is not None:
        return "--enable-lora (a parked request's LoRA would come back on top of max_loras)"
    obstacle = parking_obstacle()
    if obstacle is not None:
        return f"this vLLM's {obstacle}"
    return f"--scheduler-cls {vllm_config.scheduler_config.scheduler_cls!r} is neither {SCHEDULER} nor a subclass"


def skip_in_next_step(scheduler: Any, request: Any) -> None:
    """Leave a running request out of the step that is about to be scheduled.

    ``schedule()`` first adds 1 to ``current_step``, then skips requests whose eligible step is later.
    """
    request.next_decode_eligible_step = max(request.next_decode_eligible_step, scheduler.current_step + 2)


def is_for_second_runner(scheduler_cls: Any) -> bool:
    """Whether a scheduler, a class or its path, is this extension's for vLLM's second runner, or a subclass."""
    from vllm.utils.import_utils import resolve_obj_by_qualname

    chosen = resolve_obj_by_qualname(scheduler_cls) if isinstance(scheduler_cls, str) else scheduler_cls
    return bool(getattr(chosen, "grants_places", False))
