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
    from vllm_nld.cli.bench_cycle import time_decoding

    time_decoding(llm, 1, check.sizes.prompt_tokens, 3, check.sizes.drafts)
    watch, count = profile_steps(check, llm, check.synchronize, check.sizes.drafts)
    check.figure("profiled cycle", watch.seconds / count * 1e3, "ms")


def profile_steps(check: Check, llm: Any, wait: Callable[[], None], drafts: int = 0) -> tuple[Profiled, int]:
    """Record the launches and waits of an engine's steps at one request, and when the device has nothing to do.

    Args:
        check: records.
        llm: the engine.
        wait: called after every step. An asynchronous engine is not to be waited for.
        drafts: of a block; 0: AR.

    Returns:
        The profile, and of how many steps.
    """
    from torch.profiler import ProfilerActivity, profile

    from vllm_nld.cli.bench_cycle import time_decoding

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if check.device == "cuda" else [])]
    watch = Profiled(lambda: profile(activities=activities), wait)
    count = len(time_decoding(llm, 1, check.sizes.prompt_tokens, 20 if not check.dry else 3, drafts, watch))
    check.synchronize()
    calls, busy, lasted = watch.finish()
    unit = "a cycle" if drafts else "a step"
    for name, beginnings in CALLS.items():
        check.figure(name, sum(n for call, n in calls.items() if call.startswith(beginnings)) / count, unit)
    check.figure("device busy", busy / count * 1e3, f"ms {unit}")
    check.figure("idle share", 1 - busy / lasted)
    tell_gaps(check, watch.spans, count)
    return watch, count


class Profiled:
    """Replaces a stopwatch: profiles only the timed steps."""

    def __init__(self, start: Callable[[], Any], synchronize: Callable[[], None]) -> None:
        self._start = start
        self._synchronize = synchronize
        self._profile: Any = None
        self._began = 0.0
        self.seconds = 0.0
        self.spans: list[tuple[float, float, str]] = []

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

        What the device did is in ``spans`` then: begin and end in microseconds, and the name.
        The device's own clock decides: the host may be ahead of it when the last step returns.
        """
        from torch._C._autograd import DeviceType

        self._profile.__exit__(None, None, None)
        calls: Counter[str] = Counter()
        for event in self._profile.events():
            if event.device_type == DeviceType.CPU:
                calls[event.name] += 1
            elif not getattr(event, "is_user_annotation", False):  # those also span the time between kernels
                self.spans.append((event.time_range.start, event.time_range.end, event.name))
        spans = [span[:2] for span in self.spans]
        lasted = max((end for _, end in spans), default=1e6) - min((start for start, _ in spans), default=0.0)
        return calls, covered(spans) * 1e-6, lasted * 1e-6


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of spans."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


GAPS = {"under 2 us": (0.0, 2.0), "2 to 10 us": (2.0, 10.0), "over 10 us": (10.0, float("inf"))}
"""Kernels of a graph follow one another within 2 us; a launch that the host is late for takes longer."""


def idle_gaps(spans: Iterable[tuple[float, float, str]]) -> list[tuple[float, str, str]]:
    """Return when a device had nothing to do: for how long, after what, and before what."""
    found, reached, last = [], float("inf"), ""
    for start, end, name in sorted(spans):
        if start > reached:
            found.append((start - reached, last, name))
        if end > reached or not last:
            reached, last = end, name
    return found


def tell_gaps(check: Check, spans: Iterable[tuple[float, float, str]], steps: int, most: int = 8) -> None:
    """Record a step's idle time by the gaps' sizes, and the pairs of kernels with most of it between them."""
    gaps = idle_gaps(spans)
    for name, (least, limit) in GAPS.items():
        own = [gap for gap, *_ in gaps if least <= gap < limit]
        check.figure("idle in gaps", sum(own) / steps, "us a step", of=name, gaps=round(len(own) / steps, 1))
    between: Counter[tuple[str, str]] = Counter()
    for gap, before, after in gaps:
        between[before[:60], after[:60]] += gap
    for (before, after), total in between.most_common(most):
        check.figure("idle between", total / steps, "us a step", of=f"{before} -> {after}")
