"""The worker of a GPU (``ParallelConfig.worker_cls``)."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from vllm_nld.worker import IntroducesProposer


class NLDGPUWorker(IntroducesProposer, Worker):  # type: ignore[misc]
    """vLLM's GPU worker with the proposer attached."""
