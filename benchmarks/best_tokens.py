"""Times the steps after the head's product: finding each row's token and normalizer, and exchanging them between ranks.

First it compares best_tokens with PyTorch, in one process with all cores: the results for a draft (token, largest
logit, normalizer), and for greedy verification (the token). Then the exchange and cost of a draft's head with tensor
parallelism: all logits gathered, or three numbers per row; two processes, one core each, on vLLM's own communicator.
Also the cost of sending the first rank's decision to all.

python benchmarks/best_tokens.py --json results.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

RANKS = 2
HIDDEN = 3072


def timed(call: Any, seconds: float) -> float:
    """Return the median seconds of a call that all ranks make equally often."""
    import torch

    call()
    started = time.perf_counter()
    call()
    repeats = torch.tensor([max(5, min(1000, round(seconds / (time.perf_counter() - started))))])
    torch.distributed.broadcast(repeats, 0)
    times = []
    for _ in range(int(repeats)):
        torch.distributed.barrier()
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return median(times)


def measure_operator(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time best_tokens and the code that it replaces."""
    import torch
    from attention import medians

    from vllm_nld import ops

    best_tokens = ops.function("best_tokens", "cpu")

    def draft_in_pytorch(logits: Any) -> None:
        for rows in torch.split(logits, 16):  # so that rows stay in the cache while they are read several times
            rows = rows.float()
            rows.gather(1, rows.argmax(-1, keepdim=True)), torch.logsumexp(rows, -1)

    calls = {
        "ms_draft_pytorch": draft_in_pytorch,
        "ms_draft_best_tokens": best_tokens,
        "ms_verify_pytorch": lambda logits: logits.float().argmax(-1),
        "ms_verify_best_tokens": lambda logits: best_tokens(logits, False),
    }
    found = []
    for rows in arguments.operator_rows:
        logits = torch.randn(rows, arguments.vocab).bfloat16()
        bound = {name: partial(call, logits) for name, call in calls.items()}
        times = medians(bound, len(calls) * arguments.seconds)
        milliseconds = {name: seconds * 1e3 for name, seconds in times.items()}
        found.append({"operator_rows": rows, "threads": torch.get_num_threads(), **milliseconds})
    return found


def measure(rank: int, store: str, arguments: argparse.Namespace, results: Any) -> None:
    """One rank's work; the first rank reports."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank % len(os.sched_getaffinity(0))]})
    os.environ |= {"VLLM_DIST_IDENT": Path(store).name, "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        init_distributed_environment,
        initialize_model_parallel,
        tensor_model_parallel_all_gather,
    )
    from vllm.platforms import current_platform

    from vllm_nld.auto.agreement import first_rank_decides
    from vllm_nld.model.best_tokens import best_of, combine, shard_summary

    torch.set_num_threads(1)
    current_platform.import_kernels()
    with set_current_vllm_config(VllmConfig()), torch.inference_mode():
        init_distributed_environment(RANKS, rank, f"file://{store}", rank, "gloo")
        initialize_model_parallel(RANKS)
        columns = arguments.vocab // RANKS
        weight = torch.randn(columns, HIDDEN).bfloat16()
        for rows in arguments.rows:
            torch.manual_seed(rank)
            logits = torch.randn(rows, columns).bfloat16()

            def gathered(logits: Any = logits) -> Any:
                return best_of(tensor_model_parallel_all_gather(logits))

            def summarized(logits: Any = logits) -> Any:
                summary = shard_summary(logits, rank * columns)
                return combine(tensor_model_parallel_all_gather(summary[None], dim=0))

            assert torch.equal(gathered().tokens, summarized().tokens), "the choices differ"
            hidden = torch.randn(rows, HIDDEN).bfloat16()
            found = {
                "rows": rows,
                "vocab": arguments.vocab,
                "bytes_gathered": logits.nbytes,
                "bytes_summarized": rows * 3 * 4,
                "ms_gathered": timed(gathered, arguments.seconds) * 1e3,
                "ms_summarized": timed(summarized, arguments.seconds) * 1e3,
                "ms_product": timed(lambda x=hidden: torch.nn.functional.linear(x, weight), arguments.seconds) * 1e3,
            }
            if rank == 0:
                results.put(found)
        decision = (dict.fromkeys(range(32), 16), 0)
        agreed = timed(lambda: first_rank_decides(lambda: decision), arguments.seconds) * 1e6
        # The reader waits.
        if rank == RANKS - 1:
            results.put({"us_first_rank_decides": agreed})
        torch.distributed.barrier()


def main() -> None:
    """Run the ranks and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=int, default=131072)
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--operator-rows", type=int, nargs="+", default=[1, 33, 256], help="only for best_tokens")
    parser.add_argument("--seconds", type=float, default=2.0, help="per measurement")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    from rich.console import Console
    from rich.table import Table

    operator = measure_operator(arguments)
    table = Table("rows", "threads", "draft: PyTorch, ms", "best_tokens, ms", "verify: PyTorch, ms", "best_tokens, ms")
    for one in operator:
        numbers = (f"{value:.3f}" for key, value in one.items() if key.startswith("ms_"))
        table.add_row(str(one["operator_rows"]), str(one["threads"]), *numbers)
    Console().print(table)

    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=measure, args=(rank, f"{folder}/store", arguments, results)) for rank in range(RANKS)
        ]
        for process in ranks:
            process.start()
        found = [results.get(timeout=600) for _ in range(len(arguments.rows) + 1)]
        for process in ranks:
            process.join()
    table = Table(
        "rows", "exchanged per rank, gathered", "summarized", "gathered, ms", "summarized, ms", "head product, ms"
    )
    for one in (one for one in found if "rows" in one):
        table.add_row(
            str(one["rows"]),
            f"{one['bytes_gathered'] / 2**20:.1f} MiB",
            f"{one['bytes_summarized']} B",
            *(f"{one[key]:.2f}" for key in ("ms_gathered", "ms_summarized", "ms_product")),
        )
    Console().print(table)
    (agreed,) = (one["us_first_rank_decides"] for one in found if "us_first_rank_decides" in one)
    Console().print(f"the first rank decides for all: {agreed:.0f} us")
    if arguments.json:
        arguments.json.write_text(json.dumps(operator + found, indent=2) + "\n")


if __name__ == "__main__":
    main()
