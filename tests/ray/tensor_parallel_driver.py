"""Tensor parallelism under Ray, as a user would run it. Reads a job from standard input, writes results to a file.

python tensor_parallel_driver.py RESULTS < JOB, where the job is {"model", "prompts", "cases": [[nld, params], ...]}
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any


def facts(worker: Any) -> dict[str, Any]:
    """A worker's class, and where it found the extension."""
    import ray
    from vllm.platforms import current_platform

    import vllm_nld

    return {
        "worker": type(getattr(worker, "worker", worker)).__name__,  # Ray's executor returns a wrapper
        "module": vllm_nld.__file__,
        "folder": os.getcwd(),  # noqa: PTH109
        "pid": os.getpid(),
        "devices": ray.get_runtime_context().get_accelerator_ids()[current_platform.ray_device_key],
        "draft_forwards": worker.nld_counters()["draft_forwards"],
    }


def main() -> None:
    """Generate every case with one rank and with two, all in one batch; then kill a worker."""
    job = json.load(sys.stdin)
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    expected = alone(job)
    llm = start(job["model"], distributed_executor_backend="ray", tensor_parallel_size=2)
    results = {
        "expected": expected,
        "tokens": complete(llm, job),
        "workers": llm.collective_rpc(facts),
        "driver": os.getpid(),
    }
    results["death"] = kill(llm, results["workers"][1]["pid"], prompts)
    Path(sys.argv[1]).write_text(json.dumps(results))
    llm.llm_engine.engine_core.shutdown()


def start(model: str, **settings: Any) -> Any:
    """Start an engine with self-speculation."""
    from vllm import LLM

    return LLM(
        model=model,
        speculative_config={"model": "vllm_nld.SelfSpeculation"},
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        kv_cache_memory_bytes=1 << 25,
        **settings,
    )


def complete(llm: Any, job: dict[str, Any]) -> list[list[int]]:
    """Return the tokens of every prompt in every case."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    params = [SamplingParams(**rest, extra_args={"nld": nld}) for nld, rest in job["cases"] for _ in prompts]
    outputs = llm.generate(prompts * len(job["cases"]), params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def alone(job: dict[str, Any]) -> list[list[int]]:
    """Return what one rank generates, in this process, because it imports vLLM anyway."""
    from vllm_nld.cli.engine import stop

    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ.update(settings)
    llm = start(job["model"])
    tokens = complete(llm, job)
    stop(llm)
    for name in settings:
        del os.environ[name]
    return tokens


def kill(llm: Any, worker: int, prompts: list[dict[str, list[int]]]) -> dict[str, Any]:
    """Kill a worker during generation; return how the generation ended, and after how many seconds."""
    from vllm import SamplingParams

    killed: list[float] = []

    def strike() -> None:
        killed.append(time.monotonic())
        os.kill(worker, signal.SIGKILL)

    threading.Timer(0.5, strike).start()
    try:
        llm.generate(prompts * 200, SamplingParams(temperature=0, max_tokens=200, detokenize=False), use_tqdm=False)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "seconds": time.monotonic() - killed[0]}
    return {"error": "", "seconds": 0.0}


if __name__ == "__main__":
    main()
