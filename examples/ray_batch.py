"""Complete the prompts of JSONL or Parquet files on a Ray cluster: data parallel x tensor parallel, resumable.

python examples/ray_batch.py prompts.jsonl --output results --replicas 2 --mode self_speculation
python examples/ray_batch.py prompts.parquet --output results --replicas 4 --tensor-parallel-size 2 \
    --engine '{"dtype": "bfloat16", "max_model_len": 8192}'

Each of the --replicas is a Ray actor with a vLLM engine of --tensor-parallel-size workers. Results are appended to
results/part-*.jsonl as batches finish. The same command continues an interrupted run.
docs/operate/serving_at_scale.md explains what happens when something dies.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import itertools
import json
import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from batch_output import BatchError, Output, Row, read_rows

from vllm_nld.checkpoints import checkpoint_path
from vllm_nld.serving.ledger import DECODE_KINDS, Tally

ATTEMPTS = 3
"""Attempts at a batch. If replicas died each time, its rows are tried again one by one, in a separate round."""
STOP_SECONDS = 2.0
"""Seconds for the replicas to stop their engines. When the driver has ended, Ray kills the remaining ones."""
COLUMNS = ["id", "prompt_digest", "text", "finish_reason", "prompt_tokens", "tokens", "error", "replica"]


class Replica:
    """Runs in each actor: an engine that gets several batches at once, so that its batch is always full.

    Args:
        engine: arguments of vLLM's ``AsyncEngineArgs``.
        sampling: arguments of vLLM's ``SamplingParams``.
        cores: CPU cores per worker that this replica claims; 0 leaves the choice to vLLM.
        hang_timeout: seconds after which an engine that does not answer counts as dead.
        attempts: handle of the run's :class:`Attempts`.
    """

    def __init__(
        self, engine: dict[str, Any], sampling: dict[str, Any], cores: int, hang_timeout: float, attempts: Any
    ) -> None:
        from vllm_nld.serving import replica

        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        self.guard = replica.Guard()
        if cores:
            replica.claim_cores(cores, engine.get("tensor_parallel_size", 1))
        from vllm import AsyncEngineArgs, SamplingParams
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.async_llm import AsyncLLM

        self.engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine))
        self.guard.forget_metrics_of(self.engine.vllm_config)
        self.params = SamplingParams(**sampling, output_kind=RequestOutputKind.FINAL_ONLY)
        self.counts_forwards = engine.get("speculative_config") is not None
        self.hang_timeout, self.attempts = hang_timeout, attempts
        self.watch: asyncio.Task[Any] | None = None
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self.numbers = itertools.count()
        atexit.register(self.stop)
        self.rows = self.tokens = 0
        self.started = time.monotonic()

    def stop(self) -> None:
        """Stop the engine without reporting it as dead."""
        if self.watch is not None:
            self.watch.get_loop().call_soon_threadsafe(self.watch.cancel)
        self.engine.shutdown()

    async def __call__(self, batch: pa.Table) -> pa.Table:
        """Return the results of a batch, one row each; the column ``so_far`` has the replica's counts so far."""
        if self.watch is None:
            from vllm_nld.serving.replica import end_with

            self.watch = asyncio.get_running_loop().create_task(end_with(self.engine, self.hang_timeout))
            self.started = time.monotonic()
        rows = [Row(**row) for row in batch.to_pylist()]
        if await self.attempts.begin.remote(rows[0].id) > ATTEMPTS:
            return pa.Table.from_pylist([{"id": row.id, "abandoned": True} for row in rows])
        results = await asyncio.gather(*(self.complete(row) for row in rows))
        so_far = {"rows": self.rows, "tokens": self.tokens, "seconds": time.monotonic() - self.started}
        if self.counts_forwards:
            so_far["tally"] = (await self.engine.collective_rpc("nld_tally"))[0]
        return pa.Table.from_pylist([result | {"so_far": json.dumps(so_far)} for result in results])

    async def complete(self, row: Row) -> dict[str, Any]:
        """Return the result of one row; a refused row gets an ``error`` instead of a text."""
        result = dict.fromkeys(COLUMNS, "") | {"id": row.id, "prompt_digest": row.digest, "replica": self.name}
        result |= {"prompt_tokens": 0, "tokens": 0}
        try:
            async for output in self.engine.generate(row.prompt, self.params, f"{row.id}-{next(self.numbers)}"):
                (completion,) = output.outputs
                result |= {"text": completion.text, "finish_reason": completion.finish_reason}
                result |= {"prompt_tokens": len(output.prompt_token_ids), "tokens": len(completion.token_ids)}
        except Exception as error:
            if self.engine.errored:
                await asyncio.Event().wait()  # not caused by this row: the watch ends the process, and Ray tries again
            result["error"] = f"{type(error).__name__}: {error}"
        self.rows += 1
        self.tokens += result["tokens"]
        return result


@ray.remote(num_cpus=0)
class Attempts:
    """Counts the attempts at each batch, because Ray tries again forever, and one row may kill every engine."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def begin(self, batch: str) -> int:
        """Count and return the attempts at a batch, which its first row identifies."""
        self.counts[batch] += 1
        return self.counts[batch]


class Report:
    """Progress on standard error while the batch runs, and a table by replica at its end."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done, self.tokens, self.refused = total, done, 0, 0
        self.started = time.monotonic()
        self.replicas: dict[str, dict[str, Any]] = {}

    def add(self, output: Output, results: list[dict[str, Any]]) -> None:
        """Write a batch to the folder, count it, and print a line."""
        results = [result for result in results if not result.pop("abandoned", False)]
        for result in results:
            so_far = json.loads(result.pop("so_far"))
            if so_far["rows"] >= self.replicas.get(result["replica"], so_far)["rows"]:
                self.replicas[result["replica"]] = so_far
            self.tokens += result["tokens"]
            self.refused += bool(result["error"])
        self.done += output.add(results)
        rate = self.tokens / (time.monotonic() - self.started)
        print(f"{self.done} of {self.total} rows, {rate:.0f} tokens/s with start-up", file=sys.stderr, flush=True)

    def lines(self) -> Iterator[str]:
        """Yield the table: rows, tokens per second and TPF by replica."""
        yield f"{'replica':32} {'rows':>8} {'tokens':>10} {'tokens/s':>10} {'TPF':>6}"
        for name, so_far in sorted(self.replicas.items()):
            tpf = tokens_per_forward(so_far["tally"]) if "tally" in so_far else None
            rate = so_far["tokens"] / so_far["seconds"]
            cell = "-" if tpf is None else f"{tpf:.2f}"
            yield f"{name:32} {so_far['rows']:8} {so_far['tokens']:10} {rate:10.1f} {cell:>6}"
        yield f"all: {self.tokens} tokens in {time.monotonic() - self.started:.1f} s, with start-up"
        if self.refused:
            yield f"{self.refused} rows were refused; their column 'error' says why"


def tokens_per_forward(counts: dict[str, dict[str, int]]) -> float | None:
    """Return tokens per decode forward (all but the prefill), or None before the first."""
    tally = Tally.between({name: {} for name in counts}, counts)
    forwards = sum(tally.forwards[kind] for kinds in DECODE_KINDS.values() for kind in kinds)
    return sum(tally.tokens.values()) / forwards if forwards else None


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", type=Path, nargs="+", help=".jsonl or .parquet files")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of the results; an earlier run's is continued"
    )
    parser.add_argument("--prompt-column", default="prompt", help="column of the prompt (default: prompt)")
    parser.add_argument("--id-column", help="column of a unique id (default: rows are numbered from 0)")
    parser.add_argument("--model", default=str(checkpoint_path("tiny")), help="checkpoint (default: the embedded one)")
    parser.add_argument("--engine", type=json.loads, default={}, help="further arguments of vLLM's engine, JSON")
    parser.add_argument("--ar-engine", action="store_true", help="without speculation; every row is decoded in AR")
    parser.add_argument("--mode", help="auto, ar, self_speculation or diffusion (default: the engine's)")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens to generate per row (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--sampling", type=json.loads, default={}, help="further arguments of SamplingParams, JSON")
    parser.add_argument("--replicas", type=int, default=1, help="engines (data parallel; default: 1)")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="workers of an engine (default: 1)")
    parser.add_argument("--num-cpus", type=float, default=1.0, help="CPUs that Ray reserves per replica (default: 1)")
    parser.add_argument("--num-gpus", type=float, help="GPUs per replica (default: one per worker, if there are any)")
    parser.add_argument("--cores", type=int, default=0, help="without GPU: cores of each worker's own")
    parser.add_argument("--batch-size", type=int, default=32, help="rows of a batch (default: 32)")
    parser.add_argument("--batches-in-flight", type=int, default=2, help="batches that a replica works on (default: 2)")
    parser.add_argument(
        "--hang-timeout", type=float, default=20.0, help="an engine silent for this long is dead (default: 20 s)"
    )
    parser.add_argument("--address", help="Ray cluster (default: a running one, or a new one on this machine)")
    return parser.parse_args()


def engine_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of vLLM's engine."""
    speculative = None if args.ar_engine else {"model": "vllm_nld.SelfSpeculation"}
    engine = {"model": args.model, "tensor_parallel_size": args.tensor_parallel_size, "speculative_config": speculative}
    return engine | args.engine


def sampling_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of vLLM's ``SamplingParams``."""
    extra = {"extra_args": {"nld": {"mode": args.mode}}} if args.mode else {}
    return {"max_tokens": args.max_tokens, "temperature": args.temperature} | extra | args.sampling


def dataset(args: argparse.Namespace, rows: Iterable[Row], attempts: Any) -> ray.data.Dataset:
    """Return the results as a dataset; Ray starts the replicas when it is iterated over.

    Ray Data restarts a dead replica, and gives its batches to any replica again.
    """
    tables = []
    rows = iter(rows)
    while batch := list(itertools.islice(rows, args.batch_size)):
        tables.append(pa.table({"id": [row.id for row in batch], "prompt": [row.prompt for row in batch]}))
    gpus = args.num_gpus
    if gpus is None:
        gpus = args.tensor_parallel_size if ray.cluster_resources().get("GPU") else 0
    for resource, each in (("CPU", args.num_cpus), ("GPU", gpus)):
        there = ray.cluster_resources().get(resource, 0)
        if each * args.replicas > there:
            needed = f"--replicas {args.replicas} need {each * args.replicas:g} {resource}s"
            print(f"{needed}, the cluster has {there:g} so far: some will wait", file=sys.stderr)
    return ray.data.from_arrow(tables).map_batches(
        Replica,
        fn_constructor_kwargs={
            "engine": engine_arguments(args),
            "sampling": sampling_arguments(args),
            "cores": args.cores,
            "hang_timeout": args.hang_timeout,
            "attempts": attempts,
        },
        batch_size=args.batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            size=args.replicas,
            max_tasks_in_flight_per_actor=args.batches_in_flight,
            max_concurrent_calls_per_actor=args.batches_in_flight,
        ),
        num_cpus=args.num_cpus,
        num_gpus=gpus,
    )


def run(args: argparse.Namespace) -> int:
    """Complete all rows that have no result yet; return the exit status."""
    settings = {"engine": engine_arguments(args), "sampling": sampling_arguments(args)}
    output = Output(args.output, settings)

    def rows() -> Iterator[Row]:
        return read_rows(args.inputs, args.prompt_column, args.id_column)

    total, missing = sum(1 for _ in rows()), sum(1 for _ in output.missing(rows()))
    report = Report(total, total - missing)
    print(f"{report.done} of {total} rows have a result already", file=sys.stderr, flush=True)
    if missing:
        ray.init(address=args.address, log_to_driver=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # after ray.init, which sets its own handler
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
    for size, in_flight in ((args.batch_size, args.batches_in_flight), (1, 1)) if missing else ():
        args.batch_size, args.batches_in_flight = size, in_flight
        results = dataset(args, output.missing(rows()), Attempts.remote())
        for block in results.iter_batches(batch_size=None, batch_format="pyarrow"):
            report.add(output, block.to_pylist())
        if not any(output.missing(rows())):
            break
    print(*report.lines(), sep="\n", flush=True)
    time.sleep(STOP_SECONDS if report.replicas else 0)
    if ids := [row.id for row in output.missing(rows())]:
        raise BatchError(
            f"no result for rows {', '.join(ids[:20])} ({len(ids)}): replicas died {ATTEMPTS} times over each"
        )
    return 3 if report.refused else 0


def main() -> None:
    """Run, and print one line if an error ended the run early."""
    args = parse_arguments()
    again = "the same command continues from there"
    try:
        sys.exit(run(args))
    except BatchError as error:
        sys.exit(f"ray_batch: error: {error}")
    except ray.exceptions.RayError as error:
        sys.exit(f"ray_batch: error: {error}\nray_batch: results so far are in {args.output}; {again}")
    except KeyboardInterrupt:
        sys.exit(f"ray_batch: interrupted; results so far are in {args.output}; {again}")


if __name__ == "__main__":
    main()
