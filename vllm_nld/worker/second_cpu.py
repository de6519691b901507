"""The worker of a CPU with vLLM's second model runner. Importing it replaces parts of torch, as vLLM's own does."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_nld.worker.second_hooks import IntroducesSpeculator


class NLDSecondCPUWorker(IntroducesSpeculator, CPUWorker):  # type: ignore[misc]
    """vLLM's CPU worker with the speculator attached."""
