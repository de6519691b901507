"""The imports of a GPU worker do not change torch, although vLLM's CPU worker replaces parts of it when imported."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import patch

from vllm_nld.vllm_glue import workers

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
"""Everything that ``vllm/v1/worker/cpu/shm.py`` and ``cpu_model_runner.py`` replace."""

OF_CPUS = ("vllm.v1.worker.cpu.shm", "vllm.v1.worker.cpu_worker", "vllm.v1.worker.cpu_model_runner")

PROBE = """
import functools, importlib, pkgutil, sys
import torch, vllm.utils.torch_utils, vllm.v1.worker.gpu.buffer_utils, vllm_nld
from vllm_nld import plugin

def find(path):
    first, *rest = path.split(".")
    return functools.reduce(getattr, rest, sys.modules[first])

def faults():
    replaced = [path for path in patched if find(path) is not before[path]]
    return replaced + [name for name in of_cpus if name in sys.modules]

patched, of_cpus, gpu_worker, cpu_worker = [words.split() for words in sys.argv[1:]]
before = {path: find(path) for path in patched}
plugin.register()
pkgutil.resolve_name(*gpu_worker)
for module in pkgutil.walk_packages(vllm_nld.__path__, "vllm_nld."):
    if module.name.endswith(("__main__", ".worker.cpu", ".worker.second_cpu")):
        continue
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:  # an optional package
        if error.name.split(".")[0] in ("vllm", "vllm_nld", "torch"):
            raise
print("GPU", *faults())
pkgutil.resolve_name(*cpu_worker)
print("CPU", *faults())
"""


def worker(cpu: bool) -> str:
    """The worker that the plugin chooses on a platform."""
    platform = SimpleNamespace(is_cpu=lambda: cpu, is_cuda_alike=lambda: not cpu)
    config = SimpleNamespace(worker_cls="auto")
    with patch("vllm.platforms.current_platform", platform):
        workers.use_worker_subclass(config)
    return str(config.worker_cls)


def test_nothing_on_the_gpu_path_imports_the_cpu_worker() -> None:
    """All modules except one are imported. The CPU worker comes last, to check that it still replaces these parts."""
    arguments = [" ".join(words) for words in (PATCHED, OF_CPUS, [worker(cpu=False)], [worker(cpu=True)])]
    command = [sys.executable, "-c", PROBE, *arguments]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    faults = {words[0]: words[1:] for line in shown.splitlines() if (words := line.split())}
    assert faults["GPU"] == []
    assert {"torch.cuda.Event", "torch.Tensor.pin_memory", "vllm.v1.worker.cpu_worker"} <= set(faults["CPU"])
