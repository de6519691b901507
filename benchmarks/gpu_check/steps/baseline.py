"""Plain vLLM on the same shape, card and run, to compare a cycle with."""

from __future__ import annotations

import statistics

from gpu_check.check import Check
from gpu_check.serving import core, plain, runner
from gpu_check.steps.forwards import profile_steps


def run(check: Check) -> None:
    """Time its decode steps, convert the measured cycles to these, and see when the device waits for the host."""
    from vllm_nld.cli.bench_cycle import time_decoding

    llm, sizes = plain(check), check.sizes
    config = core(llm).vllm_config
    check.figure("runner", type(runner(llm)).__module__)
    check.figure("asynchronous", bool(config.scheduler_config.async_scheduling))
    check.figure("graph mode", str(config.compilation_config.cudagraph_mode))
    cycles = check.step.name.replace("baseline", "cycle")
    for count in sizes.requests if cycles == "cycle" else sizes.requests[:1]:
        step = statistics.median(time_decoding(llm, count, sizes.prompt_tokens, 3 * sizes.steps))
        check.figure("AR step", step * 1e3, "ms", requests=count)
        cycle = check.earlier(cycles, "cycle", requests=count)
        if cycle is not None:
            check.figure("cycle in AR steps", cycle * 1e-3 / step, requests=count)
        second = check.earlier(cycles.replace("cycle", "second"), "cycle", requests=count)
        if second is not None:
            check.figure("cycle on the second runner in AR steps", second * 1e-3 / step, requests=count)
    profile_steps(check, llm, lambda: None)
