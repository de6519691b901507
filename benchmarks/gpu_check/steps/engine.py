"""Starts the engine on the 8B shape, and records vLLM's choices."""

from __future__ import annotations

from typing import Any

from gpu_check.check import Check
from gpu_check.serving import core, runner, speculative


def run(check: Check) -> None:
    """Start it, and record every choice that the figures of other steps depend on."""
    llm = speculative(check)
    config = core(llm).vllm_config
    compilation, scheduler = config.compilation_config, config.scheduler_config
    layers = [layer for layer in compilation.static_forward_context.values() if hasattr(layer, "kv_cache")]
    layer = layers[0]
    from vllm_nld import ops
    from vllm_nld.attention.backend import page_layout

    decisions: dict[str, Any] = {
        "worker": config.parallel_config.worker_cls,
        "scheduler": str(scheduler.scheduler_cls),
        "runner": type(runner(llm)).__module__,
        "asynchronous": bool(scheduler.async_scheduling),
        "attention backend": layer.attn_backend.get_name(),
        "page layout": page_layout(layer).name,
        "page strides": str(list(layer.kv_cache.stride())),
        "page size": page_layout(layer).page_size(layer),
        "cache shape": str(list(layer.kv_cache.shape)),
        "graph mode": str(compilation.cudagraph_mode),
        "graph sizes": str(compilation.cudagraph_capture_sizes),
        "compilation mode": str(compilation.mode),
        "splitting operators": ", ".join(compilation.splitting_ops or []),
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
    }
    for name, found in decisions.items():
        check.figure(name, found)
    for operator in ops.OPERATORS:
        check.figure("operator", ops.implementation(operator, check.device).name, of=operator)
    costs = runner(llm).drafter.auto.costs
    for tokens in check.sizes.forward_tokens:
        for of, curve in {"draft": costs.draft, "verify": costs.verify}.items():
            check.figure("auto mode's price", curve.seconds(tokens) * 1e3, "ms", of=of, tokens=tokens)
