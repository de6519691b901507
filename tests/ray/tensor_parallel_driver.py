"""What a user would run: tensor parallelism under Ray. Reads a job from standard input, writes results to a file.

python tensor_parallel_driver.py RESULTS < JOB, where the job is {"model", "prompts", "cases": [[nld, params], ...]}
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def facts(worker: Any) -> dict[str, Any]:
    """What a worker is, and where it found the extension."""
    import ray
    from vllm.platforms import current_platform

    import vllm_nld

    return {
        "worker": type(worker.worker).__name__,
        "module": vllm_nld.__file__,
        "folder": os.getcwd(),  # noqa: PTH109
        "pid": os.getpid(),
        "devices": ray.get_runtime_context().get_accelerator_ids()[current_platform.ray_device_key],
        "draft_forwards": worker.nld_counters()["draft_forwards"],
    }


def main() -> None:
    """Generate every case, all in one batch."""
    from vllm import LLM, SamplingParams

    job = json.load(sys.stdin)
    llm = LLM(
        model=job["model"],
        distributed_executor_backend="ray",
        tensor_parallel_size=2,
        speculative_config={"model": "vllm_nld.SelfSpeculation"},
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        kv_cache_memory_bytes=1 << 25,
    )
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    params = [SamplingParams(**rest, extra_args={"nld": nld}) for nld, rest in job["cases"] for _ in prompts]
    outputs = llm.generate(prompts * len(job["cases"]), params, use_tqdm=False)
    results = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "workers": llm.collective_rpc(facts),
        "driver": os.getpid(),
    }
    Path(sys.argv[1]).write_text(json.dumps(results))
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
