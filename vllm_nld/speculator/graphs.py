"""CUDA graphs of draft passes: one per number of requests, the rest of whose slots is padding.

Capture and replay are vLLM's own; what differs is what is captured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.config import CUDAGraphMode, VllmConfig
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager


class DraftGraphs(CudaGraphManager):  # type: ignore[misc]
    """vLLM's manager of full graphs of uniform batches; a batch is ``slots`` requests of a block each."""

    def __init__(self, vllm_config: VllmConfig, device: Any, block_length: int) -> None:
        super().__init__(vllm_config, device, CUDAGraphMode.FULL_DECODE_ONLY, decode_query_len=block_length)
        self._by_slots: dict[int, Any] = {}

    def capture_passes(self, run: Callable[[int], None]) -> None:
        """Capture ``run(slots)`` for every number of slots that vLLM's capture sizes make."""

        def create_forward(description: Any, warmup: bool) -> Callable[[CUDAGraphMode], None]:
            return lambda _: run(description.num_reqs)

        super().capture(create_forward, "Capturing draft passes")
        self._by_slots = {description.num_reqs: description for description in self.graphs}

    def slots_for(self, requests: int) -> int | None:
        """Return the slots of the smallest graph with room for so many requests, or None."""
        return min((slots for slots in self._by_slots if slots >= requests), default=None)

    def replay(self, slots: int) -> None:
        """Run the graph that :meth:`slots_for` named."""
        self.run_fullgraph(self._by_slots[slots])
