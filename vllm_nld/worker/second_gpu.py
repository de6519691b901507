"""The worker of a GPU with vLLM's second model runner."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from vllm_nld.worker.second_hooks import IntroducesSpeculator


class NLDSecondGPUWorker(IntroducesSpeculator, Worker):  # type: ignore[misc]
    """vLLM's GPU worker with the speculator attached."""
