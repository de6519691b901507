"""Where the time of a step goes, in an engine that runs in this process: timed functions of vLLM and of ours.

Times are exclusive: time that a timed function spends in another timed function counts for the other.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

PARTS = ("draft forward", "verify forward", "draft pass", "proposer", "sampling", "scheduler", "runner", "rest")
"""The two forwards of the model, with the output layer; the draft pass without its forward; the proposer without the
draft pass; vLLM's sampler; its scheduler; its model runner without all of these; the rest of the step."""


class Watch(Protocol):
    """Runs steps and records something."""

    def step(self, step: Callable[[], Any]) -> Any:
        """Run one step and return what it returned."""


class Stopwatch:
    """Times the parts of every step until it is closed. Also a context manager.

    Args:
        llm: an ``LLM`` whose engine core runs in this process.
        synchronize: waits for the device. Called where a part begins and where it ends, so that a part's time includes
            its kernels. Steps then take longer than without. Not needed on a CPU.
    """

    def __init__(self, llm: Any, synchronize: Callable[[], None] | None = None) -> None:
        self._synchronize = synchronize or (lambda: None)
        self._now: dict[str, float] = {}
        self._running: list[tuple[str, float]] = []
        self._wrapped: list[tuple[Any, str, Any]] = []
        self.steps: list[dict[str, float]] = []
        core = llm.llm_engine.engine_core.engine_core
        worker = core.model_executor.driver_worker.worker
        runner = worker.model_runner
        drafter = getattr(runner, "drafter", None)
        for name in ("forward", "compute_logits"):
            self._wrap(runner.get_model(), name, self._forward)
        self._wrap(runner, "_model_forward", self._forward)  # a replayed CUDA graph never enters the model's forward
        self._wrap(runner, "_sample", lambda: "sampling")
        for name in ("execute_model", "sample_tokens"):
            self._wrap(worker, name, lambda: "runner")
        for name in ("schedule", "update_from_output", "update_draft_token_ids"):
            self._wrap(core.scheduler, name, lambda: "scheduler")
        if drafter is not None:
            self._wrap(drafter.draft_pass, "run", lambda: "draft pass")
            self._wrap(drafter, "propose", lambda: "proposer")

    def _forward(self) -> str:
        drafting = any(part == "draft pass" for part, _ in self._running)
        return "draft forward" if drafting else "verify forward"

    def _wrap(self, owner: Any, name: str, part: Callable[[], str]) -> None:
        original = getattr(owner, name)
        self._wrapped.append((owner, name, vars(owner).get(name)))

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._enter(part())
            try:
                return original(*args, **kwargs)
            finally:
                self._leave()

        setattr(owner, name, timed)

    def _enter(self, part: str) -> None:
        self._synchronize()
        self._running.append((part, time.perf_counter()))

    def _leave(self) -> None:
        self._synchronize()
        part, started = self._running.pop()
        spent = time.perf_counter() - started
        self._now[part] = self._now.get(part, 0.0) + spent
        if self._running:  # the caller's own time is not counted
            outer = self._running[-1][0]
            self._now[outer] = self._now.get(outer, 0.0) - spent

    def __enter__(self) -> Stopwatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the engine as it was."""
        for owner, name, own in reversed(self._wrapped):
            delattr(owner, name)
            if own is not None:
                setattr(owner, name, own)
        self._wrapped.clear()

    def step(self, step: Callable[[], Any]) -> Any:
        """Run one step, note its parts, and return what it returned."""
        self._now = {}
        self._enter("rest")
        outputs = step()
        self._leave()
        self.steps.append(self._now)
        return outputs

    def medians(self) -> dict[str, float]:
        """Median seconds of every part, over the steps so far."""
        return {part: statistics.median(step.get(part, 0.0) for step in self.steps) for part in PARTS}
