"""What a GPU worker imports must leave torch as it is: vLLM's CPU worker replaces parts of torch when it is imported."""

from __future__ import annotations

import subprocess
import sys

from vllm_nld import compat

PATCHED = (
    "torch.Event",
    "torch.cuda.Event",
    "torch.cuda.Stream",
    "torch.cuda.set_stream",
    "torch.cuda.current_stream",
    "torch.cuda.stream",
    "torch.accelerator.synchronize",
    "torch.accelerator.empty_cache",
    "torch.accelerator.get_memory_info",
    "torch.Tensor.pin_memory",
    "torch.Tensor.record_stream",
    "vllm.utils.torch_utils.async_tensor_h2d",
    "vllm.v1.worker.gpu.buffer_utils.UvaBuffer",
)
"""All that ``vllm/v1/worker/cpu/shm.py`` and ``cpu_model_runner.py`` replace."""

OF_CPUS = ("vllm.v1.worker.cpu.shm", "vllm.v1.worker.cpu_worker", "vllm.v1.worker.cpu_model_runner")

OF_GPUS = (
    "vllm_nld.proposer",
    "vllm_nld.draft_pass",
    "vllm_nld.scheduler",
    "vllm_nld.model",
    "vllm_nld.attention.backend",
    "vllm_nld.attention.triton_ops",
    "vllm_nld.attention.cuda_ops",
    "vllm_nld.attention.xformers_ops",
    "vllm_nld.greedy_verify",
    "vllm_nld.vocab_head",
    "vllm_nld.learned_sampler",
    "vllm_nld.engine_config",
    "vllm_nld.collector",
)
"""What the plugin, the worker and the scheduler of an engine on a GPU import, at once or later."""

PROBE = """
import functools, importlib, sys
import torch, vllm.utils.torch_utils, vllm.v1.worker.gpu.buffer_utils
from vllm_nld import plugin

def find(path):
    first, *rest = path.split(".")
    return functools.reduce(getattr, rest, sys.modules[first])

def faults():
    return [path for path in patched if find(path) is not before[path]] + [name for name in of_cpus if name in sys.modules]

patched, of_cpus, of_gpus, cpu_worker = [words.split() for words in sys.argv[1:]]
before = {path: find(path) for path in patched}
plugin.register()
for name in of_gpus:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:  # Triton, on a machine without it
        if error.name.split(".")[0] in ("vllm", "vllm_nld", "torch"):
            raise
print("GPU", *faults())
importlib.import_module(*cpu_worker)
print("CPU", *faults())
"""


def test_nothing_on_the_gpu_path_imports_the_cpu_worker() -> None:
    """The CPU worker is imported last, to see that it still replaces what is looked at."""
    gpu_worker, cpu_worker = (
        compat.WORKERS[name].rpartition(".")[0]
        for name in ("vllm.v1.worker.gpu_worker.Worker", "vllm.v1.worker.cpu_worker.CPUWorker")
    )
    arguments = [" ".join(words) for words in (PATCHED, OF_CPUS, (gpu_worker, *OF_GPUS), (cpu_worker,))]
    command = [sys.executable, "-c", PROBE, *arguments]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    faults = {words[0]: words[1:] for line in shown.splitlines() if (words := line.split())}
    assert faults["GPU"] == []
    assert {"torch.cuda.Event", "torch.Tensor.pin_memory", "vllm.v1.worker.cpu_worker"} <= set(faults["CPU"])
