"""The cost of a cycle of draft and verify with several requests in flight, and where its time goes."""

from __future__ import annotations

import statistics

from gpu_check.check import Check
from gpu_check.serving import speculative


def run(check: Check) -> None:
    """Time cycles and AR steps of the same engine; then the parts of a cycle, with a wait for the device at each."""
    from vllm_nld.cli.bench_cycle import time_decoding
    from vllm_nld.cli.stopwatch import Stopwatch

    llm, sizes = speculative(check), check.sizes
    counts = sizes.requests if check.step.name == "cycle" else sizes.requests[:1]
    for count in counts:
        settings = (llm, count, sizes.prompt_tokens, sizes.steps, sizes.drafts)
        cycle = statistics.median(time_decoding(*settings))
        check.figure("cycle", cycle * 1e3, "ms", requests=count)
        ar = statistics.median(time_decoding(*settings, extra_args={"nld": {"mode": "ar"}}))
        check.figure("AR step of this engine", ar * 1e3, "ms", requests=count)
        check.figure("cycle in AR steps of this engine", cycle / ar, requests=count)
    for count in counts:
        with Stopwatch(llm, check.synchronize) as watch:
            times = time_decoding(llm, count, sizes.prompt_tokens, sizes.steps // 2, sizes.drafts, watch)
        check.figure("cycle, waiting at every part", statistics.median(times) * 1e3, "ms", requests=count)
        for part, seconds in watch.medians().items():
            check.figure("part of a cycle", seconds * 1e3, "ms", part=part, requests=count)
