"""Repairs of vLLM's faults on CPUs that end an engine or change its text.

Each function is called only if the engine runs on a CPU, and raises an error if vLLM has changed.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch

from vllm_nld.errors import NLDError
from vllm_nld.vllm_glue.versions import SUPPORTED


def repair_seeded_prefills() -> None:
    """Let a seeded request be prefilled in chunks, and recomputed after a preemption.

    A step samples for every request, and drops the sample of a request whose prompt is not complete. vLLM then takes
    the random numbers back with ``Generator.set_offset`` (``GPUModelRunner._bookkeeping_sync``). A CPU's generator
    lacks that, so the engine ends. Here such a request is sampled without its generator, which then does not advance.
    Does nothing if vLLM does not call ``set_offset``. Idempotent.

    Raises:
        NLDError: vLLM finds the dropped samples in another way than this function expects.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    original = CPUModelRunner.sample_tokens
    source = inspect.getsource(CPUModelRunner._bookkeeping_sync)
    if getattr(original, "spares_generators", False) or "set_offset" not in source:
        return
    if "self.discard_request_mask.np[:num_reqs]" not in source or "self.input_batch.generators.get(" not in source:
        raise NLDError(f"this vLLM's model runner drops samples in another way; vllm-nld supports vLLM {SUPPORTED}")

    @functools.wraps(original)
    def sample_without_dropped(self: Any, *args: Any, **kwargs: Any) -> Any:
        generators: dict[int, torch.Generator] = self.input_batch.generators
        dropped = self.discard_request_mask.np[: self.input_batch.num_reqs].nonzero()[0].tolist()
        spared = {row: generators.pop(row) for row in dropped if row in generators}
        try:
            return original(self, *args, **kwargs)
        finally:
            generators.update(spared)

    sample_without_dropped.spares_generators = True  # type: ignore[attr-defined]
    CPUModelRunner.sample_tokens = sample_without_dropped


def repair_cpu_temperature() -> None:
    """Make sampled requests keep their temperature on the CPU while speculation is on.

    vLLM's CPU stand-in for the Triton ``expand`` kernel (``vllm/utils/cpu_triton_utils.py: _expand_kernel_impl``)
    fills an int64 copy of its output, so a float temperature, top-p or int32 top-k stays uninitialized memory, and
    sampled rows answer almost greedily. Seen in 0.32.0. The PyTorch replacement is correct on every version.
    Idempotent.

    Raises:
        NLDError: ``expand_batch_to_tokens`` has an unknown signature.
    """
    from vllm.v1.sample import rejection_sampler

    names = ["x", "cu_num_tokens", "num_tokens", "replace_from", "replace_to"]
    if list(inspect.signature(rejection_sampler.expand_batch_to_tokens).parameters) != names:
        raise NLDError(f"vllm.v1.sample.rejection_sampler.expand_batch_to_tokens changed; supported vLLM: {SUPPORTED}")

    def expand_batch_to_tokens(
        x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> torch.Tensor:
        counts = torch.diff(cu_num_tokens.long(), prepend=cu_num_tokens.new_zeros(1).long())
        expanded = x.repeat_interleave(counts, output_size=num_tokens)
        return torch.where(expanded == replace_from, replace_to, expanded).to(x.dtype)

    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
