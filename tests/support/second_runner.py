"""Engines on vLLM's second model runner (V2) without a GPU: its Triton kernels run in Triton's interpreter.

vLLM's CPU platform switches asynchronous scheduling off, for which there is no reason in a test.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.engines import engine, runner
from tests.support.interpreted import INTERPRETING


def complete_interpreter() -> None:
    """Mend what the interpreter lacks for vLLM's kernels: a device's logarithm, masks joined from scalars, sorting."""
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder
    from vllm.v1.sample.ops import topk_topp_sampler
    from vllm.v1.worker.gpu.sample import gumbel
    from vllm.v1.worker.gpu.spec_decode import rejection_sampler_utils

    store = InterpreterBuilder.create_masked_store
    if not hasattr(store, "takes_any_mask"):

        def takes_any_mask(self: Any, pointers: Any, values: Any, mask: Any, *others: Any) -> Any:
            mask.data = mask.data.astype(bool)
            return store(self, pointers, values, mask, *others)

        takes_any_mask.takes_any_mask = True  # type: ignore[attr-defined]
        InterpreterBuilder.create_masked_store = takes_any_mask
    topk_topp_sampler.apply_top_k_top_p_triton = topk_topp_sampler.apply_top_k_top_p_pytorch
    for module in (gumbel, rejection_sampler_utils):  # which of them, depends on vLLM's version
        if hasattr(module, "tldevice"):
            module.tldevice = types.SimpleNamespace(log1p=lambda x: tl.log(1 + x))


@contextlib.contextmanager
def second_engine(
    folder: Path, spec: bool | int = True, options: dict[str, Any] | None = None, asynchronous: bool = True,
    **settings: Any,
) -> Iterator[Any]:  # fmt: skip
    """Yield an LLM as :func:`tests.support.engines.engine` does, on the second runner."""
    from vllm_nld.vllm_glue import second_runner

    if INTERPRETING:
        complete_interpreter()
    allowed = second_runner.asynchronous_is_possible
    second_runner.asynchronous_is_possible = lambda _: asynchronous
    try:
        with engine(folder, spec, options, **({"max_num_seqs": 4, "max_model_len": 128} | settings)) as llm:
            config = llm.llm_engine.vllm_config
            assert config.use_v2_model_runner
            assert config.scheduler_config.async_scheduling == (asynchronous and bool(spec))
            yield llm
    finally:
        second_runner.asynchronous_is_possible = allowed


Seen = dict[tuple[tuple[int, ...], int], list[int]]
"""Drafts by the text's first three tokens and its length, seed included."""


def watching(propose: Any, runner: Any, seen: Seen) -> Any:
    """Return ``propose`` that puts the drafts of every block into ``seen``."""

    def propose_and_tell(input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        drafts = propose(input_batch, *args, **kwargs)
        speculator, states = runner.speculator, runner.req_states
        for row, index in enumerate(input_batch.idx_mapping_np.tolist()):
            count = int(speculator.buffers.valid[index])
            length = int(states.total_len.gpu[index])
            if count:
                start = tuple(states.all_token_ids.gpu[index, :3].tolist())
                seen[start, length] = drafts[row, :count].tolist()
        return drafts

    return propose_and_tell


@contextlib.contextmanager
def watch_drafts(llm: Any) -> Iterator[Seen]:
    """Collect the drafts of every block."""
    own, seen = runner(llm), Seen()
    propose = own.speculator.propose
    own.speculator.propose = watching(propose, own, seen)
    try:
        yield seen
    finally:
        own.speculator.propose = propose


def watch_worker(worker: Any) -> None:
    """Collect the drafts of every block of a worker, from now on, in its ``seen_drafts``; for ``collective_rpc``."""
    worker.seen_drafts, own = Seen(), worker.model_runner
    own.speculator.propose = watching(own.speculator.propose, own, worker.seen_drafts)
