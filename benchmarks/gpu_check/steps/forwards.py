"""The cost of a forward by its tokens, and a cycle's launches, waits and idle time of the device."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from gpu_check.check import Check
from gpu_check.serving import runner, speculative

CALLS = {
    "kernel launches": ("cudaLaunchKernel", "cuLaunchKernel"),
    "graph launches": ("cudaGraphLaunch",),
    "waits": ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
    "copies": ("cudaMemcpyAsync", "cudaMemcpy"),
}
"""Beginnings of names of CUDA calls."""


def run(check: Check) -> None:
    """Measure both at one request."""
    llm = speculative(check)
    _forwards(check, llm)
    _profile(check, llm)


def _forwards(check: Check, llm: Any) -> None:
    import torch

    model_runner = runner(llm)
    draft_pass = model_runner.drafter.draft_pass

    def causal(tokens: int) -> None:
        with torch.inference_mode():
            model_runner._dummy_run(tokens)  # with a graph if vLLM has one of that size
        check.synchronize()

    repeats = 2 if check.dry else 15
    for tokens in check.sizes.forward_tokens:
        check.figure("causal forward", _median(partial(causal, tokens), repeats) * 1e3, "ms", tokens=tokens)
        draft = _median(partial(draft_pass.time_forward, tokens, tokens), repeats)
        check.figure("draft forward and choice", draft * 1e3, "ms", tokens=tokens)


def _median(call: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])  # the first ones compile


def _profile(check: Check, llm: Any) -> None:
    from torch.profiler import ProfilerActivity, profile

    from vllm_nld.cli.bench_cycle import time_decoding

    cycles = 20 if not check.dry else 3
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if check.device == "cuda" else [])]
    time_decoding(llm, 1, check.sizes.prompt_tokens, cycles, check.sizes.drafts)
    watch = Profiled(lambda: profile(activities=activities), check.synchronize)
    count = len(time_decoding(llm, 1, check.sizes.prompt_tokens, cycles, check.sizes.drafts, watch))
    calls, busy, lasted = watch.finish()
    check.figure("profiled cycle", watch.seconds / count * 1e3, "ms")
    for name, beginnings in CALLS.items():
        check.figure(name, sum(n for call, n in calls.items() if call.startswith(beginnings)) / count, "a cycle")
    check.figure("device busy", busy / count * 1e3, "ms a cycle")
    check.figure("idle share", 1 - busy / lasted)


class Profiled:
    """Replaces a stopwatch: profiles only the timed steps."""

    def __init__(self, start: Callable[[], Any], synchronize: Callable[[], None]) -> None:
        self._start = start
        self._synchronize = synchronize
        self._profile: Any = None
        self._began = 0.0
        self.seconds = 0.0

    def step(self, step: Callable[[], Any]) -> Any:
        """Run one step."""
        if self._profile is None:
            self._profile = self._start()
            self._profile.__enter__()
            self._began = time.perf_counter()
        outputs = step()
        self._synchronize()
        self.seconds = time.perf_counter() - self._began
        return outputs

    def finish(self) -> tuple[Counter[str], float, float]:
        """Return the number of each host call, the device's busy seconds, and those from its first work to its last.

        The device's own clock decides: the host may be ahead of it when the last step returns.
        """
        from torch._C._autograd import DeviceType

        self._profile.__exit__(None, None, None)
        calls: Counter[str] = Counter()
        spans = []
        for event in self._profile.events():
            if event.device_type == DeviceType.CPU:
                calls[event.name] += 1
            elif not getattr(event, "is_user_annotation", False):  # those also span the time between kernels
                spans.append((event.time_range.start, event.time_range.end))
        lasted = max((end for _, end in spans), default=1e6) - min((start for start, _ in spans), default=0.0)
        return calls, covered(spans) * 1e-6, lasted * 1e-6


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of spans."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
