"""Host time of this package's own code per step on vLLM's second runner, and how much it launches.

    python benchmarks/second_host_time.py        # microseconds of Speculator.propose, and launches, by requests

What a GPU would do is left out: kernels, the model's forward and the choice of tokens are replaced by nothing, so this
runs without a GPU. ``benchmarks/host_time.py`` measures the first runner's proposer.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

LAYERS, BLOCK, HIDDEN, REPEATS = 36, 32, 8, 2000


class Launches(TorchDispatchMode):
    """Counts what would be a kernel or a copy: views are not."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not function.is_view and "empty" not in function.name() and "slice" not in function.name():
            self.counts[function.name()] += 1
        return function(*args, **(kwargs or {}))


class Stub:
    """Stands for a Triton kernel."""

    def __init__(self, name: str, counts: Counter[str]) -> None:
        self.name, self.counts = name, counts

    def __getitem__(self, grid: Any) -> Any:
        return self.launch

    def launch(self, *args: Any, **kwargs: Any) -> None:
        self.counts[self.name] += 1


def stubbed(requests: int, graphs: bool, counts: Counter[str]) -> Any:
    """Return a speculator whose kernels and model do nothing."""
    from vllm.v1.worker.cpu.buffer_utils import UvaBuffer
    from vllm.v1.worker.gpu import buffer_utils

    from vllm_nld.options import NLDOptions
    from vllm_nld.serving.admission import EngineTraits
    from vllm_nld.speculator import kernels, speculator
    from vllm_nld.speculator.buffers import DraftBuffers, Shape
    from vllm_nld.speculator.table import RequestTable

    buffer_utils.UvaBuffer = UvaBuffer  # no pinned memory here
    for name in ("prepare_kernel", "hand_out_kernel"):
        setattr(kernels, name, Stub(name, counts))
    own = object.__new__(speculator.Speculator)
    own.device, own.block_length, own.steps, own.max_tokens = torch.device("cpu"), BLOCK, BLOCK - 1, 8192
    own.table = RequestTable(requests, EngineTraits(NLDOptions(mode="self_speculation"), BLOCK), rejects=False)
    params = SimpleNamespace(
        temperature=0.0, seed=None, structured_outputs=None, bad_words_token_ids=None, extra_args=None
    )
    for index in range(requests):
        own.table.add(index, params)
    own._buffers = DraftBuffers(Shape(requests, BLOCK, 256, 16, 4096, 5), torch.float32, own.device)
    own._table = torch.zeros(requests, 256, dtype=torch.int32)
    own._kept, own.draft_logits, own.forwards, own.auto_drafts = None, None, 0, True
    own._context = {f"layers.{n}": SimpleNamespace(kv_cache=None) for n in range(LAYERS)}
    own._runner = SimpleNamespace(model=SimpleNamespace(draft_lora=None))
    hidden = torch.zeros(requests * BLOCK, HIDDEN)
    tokens = torch.zeros(requests * (BLOCK - 1), dtype=torch.int64)
    own._hidden, own._best = lambda *_: hidden, lambda _: tokens
    replay = SimpleNamespace(slots_for=lambda _: requests, replay=lambda _: counts.update(["graph"]))
    own._graphs = {False: replay} if graphs else {}
    return own


def batch(requests: int) -> Any:
    """Return what vLLM hands over: every request decodes, 100 tokens in."""
    indices = np.arange(requests)
    return SimpleNamespace(
        num_reqs=requests,
        idx_mapping=torch.arange(requests),
        idx_mapping_np=indices,
        seq_lens=torch.full((requests,), 100, dtype=torch.int32),
        seq_lens_cpu_upper_bound=torch.full((requests,), 130, dtype=torch.int32),
        num_computed_tokens_np=np.full(requests, 100, dtype=np.int32),
        num_scheduled_tokens=np.full(requests, BLOCK, dtype=np.int32),
        prefill_len_np=np.full(requests, 50, dtype=np.int32),
        num_draft_tokens_per_req=None,
    )


def measure(requests: int, graphs: bool) -> tuple[float, Counter[str]]:
    """Return microseconds of one call, and what it launches."""
    counts: Counter[str] = Counter()
    own, given = stubbed(requests, graphs, counts), batch(requests)
    zeros = torch.zeros(requests, dtype=torch.int32)
    arguments = (given, None, None, None, None, zeros, zeros, torch.zeros(requests, 1, dtype=torch.int64), None,
                 torch.zeros(requests), torch.zeros(requests, dtype=torch.int64))  # fmt: skip
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        own.propose(*arguments)
        times.append(time.perf_counter() - started)
    counts.clear()
    with Launches() as launches:
        own.propose(*arguments)
    return statistics.median(times) * 1e6, counts + launches.counts


def main() -> None:
    """Read the command line and print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for requests in (1, 32):
        for graphs in (False, True):
            microseconds, launched = measure(requests, graphs)
            way = "with a graph" if graphs else "without"
            print(f"{requests:3} requests, {way}: {microseconds:6.1f} us a step; {dict(launched)}")


if __name__ == "__main__":
    main()
