"""Self-speculation on vLLM's second model runner: asynchronous, with the draft pass in a CUDA graph."""

from __future__ import annotations

import statistics
from typing import Any

from gpu_check.check import Check
from gpu_check.serving import core, runner, second
from gpu_check.steps.forwards import profile_steps


def run(check: Check) -> None:
    """Time cycles, compare texts with those of AR, and see what the host does during a cycle."""
    from vllm_nld.cli.bench_cycle import time_decoding

    llm, sizes = second(check), check.sizes
    config = core(llm).vllm_config
    check.figure("runner", type(runner(llm)).__module__)
    check.figure("asynchronous", bool(config.scheduler_config.async_scheduling))
    check.figure("graph mode", str(config.compilation_config.cudagraph_mode))
    graphs = getattr(getattr(runner(llm), "speculator", None), "_graphs", {})
    check.figure("captured draft passes", sum(len(own.graphs) for own in graphs.values()))
    for count in sizes.requests if check.step.name == "second" else sizes.requests[:1]:
        settings = (llm, count, sizes.prompt_tokens, sizes.steps, sizes.drafts)
        cycle = statistics.median(time_decoding(*settings))
        check.figure("cycle", cycle * 1e3, "ms", requests=count)
        ar = statistics.median(time_decoding(*settings, extra_args={"nld": {"mode": "ar"}}))
        check.figure("AR step of this engine", ar * 1e3, "ms", requests=count)
        if count > 1:
            mixed = statistics.median(time_decoding(*settings, ar=count // 2))
            check.figure("cycle in which half of the requests decode by AR", mixed * 1e3, "ms", requests=count)
        first = check.earlier(check.step.name.replace("second", "cycle"), "cycle", requests=count)
        if first is not None:
            check.figure("cycle in cycles of the first runner", cycle * 1e3 / first, requests=count)
    _texts(check, llm)
    profile_steps(check, llm, lambda: None, sizes.drafts)


def _texts(check: Check, llm: Any) -> None:
    """Count greedy texts that agree with AR; in bfloat16 a near tie may fall to either token."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": [200 + (7 * row + i) % 200 for i in range(40 + row)]} for row in range(4)]
    texts = []
    for mode in ("ar", "self_speculation"):
        params = SamplingParams(
            temperature=0, max_tokens=check.sizes.new_tokens, ignore_eos=True, detokenize=False,
            extra_args={"nld": {"mode": mode}},
        )  # fmt: skip
        outputs = llm.generate(prompts, params, use_tqdm=False)
        texts.append([list(output.outputs[0].token_ids) for output in outputs])
    same = sum(own == other for own, other in zip(*texts, strict=True))
    check.figure("texts that agree with AR", f"{same} of {len(prompts)}")
