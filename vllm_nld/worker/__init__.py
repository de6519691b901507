"""Workers for ``--worker-cls``, one module per platform.

vLLM's CPU worker replaces parts of torch as soon as it is imported, which would break a GPU. So they are resolved
on demand.
"""


def __getattr__(name: str) -> object:
    """Resolve ``vllm_nld.worker.NLDCPUWorker`` and ``vllm_nld.worker.NLDGPUWorker``."""
    if name == "NLDCPUWorker":
        from vllm_nld.worker.cpu import NLDCPUWorker

        return NLDCPUWorker
    if name == "NLDGPUWorker":
        from vllm_nld.worker.gpu import NLDGPUWorker

        return NLDGPUWorker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
