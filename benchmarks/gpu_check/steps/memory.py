"""Memory of many requests at once, greedy and sampled, and whether vLLM's profiling covers it."""

from __future__ import annotations

from typing import Any

from gpu_check.check import Check
from gpu_check.serving import speculative, worker

PROFILED = (
    "peak_activation_memory",
    "cudagraph_memory_estimate",
    "non_torch_memory",
    "available_kv_cache_memory_bytes",
)
"""Attribute in which vLLM's GPU worker stores the profiled bytes."""


def run(check: Check) -> None:
    """Run some cycles of many requests, and compare the peak with the memory before and with the profiled memory."""
    from vllm_nld.cli.bench_cycle import time_decoding

    llm, sizes = speculative(check), check.sizes
    for name in PROFILED:
        found = getattr(worker(llm), name, None)
        check.figure(name, None if found is None else float(found) / 2**20, "MiB")
    profiled = getattr(worker(llm), "peak_activation_memory", None)
    cycles = max(2, sizes.steps // 8)
    # Sampled: the drafts' own probabilities, and vLLM's rejection sampler over all of them.
    for name, sampling in {"greedy": {}, "sampled": {"temperature": 1.0, "seed": None}}.items():
        before = _reset(check)
        settings: dict[str, Any] = dict(sampling)
        time_decoding(llm, sizes.crowd, 64, cycles, sizes.drafts, **settings)
        rise = _peak(check) - before
        check.figure("peak over the idle engine", rise / 2**20, "MiB", requests=sizes.crowd, sampling=name)
        if profiled:
            check.figure("peak of what was profiled", rise / float(profiled), requests=sizes.crowd, sampling=name)


def _reset(check: Check) -> float:
    """Return the bytes in use now. The peak counts from here."""
    if check.device == "cpu":
        return _resident()
    import torch

    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return float(torch.cuda.memory_allocated())


def _peak(check: Check) -> float:
    if check.device == "cpu":
        return _resident()
    import torch

    return float(torch.cuda.max_memory_allocated())


def _resident() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
