"""Workers for ``--worker-cls``, one module per platform.

vLLM's CPU worker replaces parts of torch as soon as it is imported, which would break a GPU. So they are resolved
on demand.
"""


def __getattr__(name: str) -> object:
    """Resolve the workers of vLLM's first model runner, and those of its second."""
    if name == "NLDCPUWorker":
        from vllm_nld.worker.cpu import NLDCPUWorker

        return NLDCPUWorker
    if name == "NLDGPUWorker":
        from vllm_nld.worker.gpu import NLDGPUWorker

        return NLDGPUWorker
    if name == "NLDSecondCPUWorker":
        from vllm_nld.worker.second_cpu import NLDSecondCPUWorker

        return NLDSecondCPUWorker
    if name == "NLDSecondGPUWorker":
        from vllm_nld.worker.second_gpu import NLDSecondGPUWorker

        return NLDSecondGPUWorker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
