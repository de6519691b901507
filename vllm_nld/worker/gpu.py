"""The worker of a GPU (``ParallelConfig.worker_cls``)."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from vllm_nld.draft_pass.memory import profiling_drafts
from vllm_nld.worker.hooks import IntroducesProposer


class NLDGPUWorker(IntroducesProposer, Worker):  # type: ignore[misc]
    """vLLM's GPU worker with the proposer attached."""

    def determine_available_memory(self) -> int:
        """Measure what is left for the KV cache, as vLLM does, next to the most that drafting takes."""
        with profiling_drafts(self.model_runner, self.vllm_config.speculative_config.num_speculative_tokens):
            available: int = super().determine_available_memory()
        return available
