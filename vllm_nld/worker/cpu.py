"""The worker of a CPU (``ParallelConfig.worker_cls``). Importing it replaces parts of torch, as vLLM's own does."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_nld.worker.hooks import IntroducesProposer


class NLDCPUWorker(IntroducesProposer, CPUWorker):  # type: ignore[misc]
    """vLLM's CPU worker with the proposer attached."""
