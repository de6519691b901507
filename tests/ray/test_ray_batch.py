"""examples/ray_batch.py, as a user runs it, while a replica, the driver and an engine are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.clusters import EXAMPLES, SMALL_REPLICA, Cluster
from tests.support.processes import SOON, STARTS, alive, engine_processes, wait_for
from vllm_nld.checkpoints import checkpoint_path
from vllm_nld.checkpoints.held_out import held_out_prompts

pytestmark = pytest.mark.timeout(1800)

ROWS, TOKENS = 64, 64
ENGINE = {"dtype": "float32", "max_model_len": 1024, "kv_cache_memory_bytes": 1 << 27, "enforce_eager": True}
UNFIT = "x " * 2000
"""A prompt longer than ``max_model_len``."""


@dataclass
class Batch:
    """A batch's files and command."""

    cluster: str
    folder: Path

    def start(self, count: int, *options: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(EXAMPLES / "ray_batch.py"), str(self.folder / "in.jsonl")]
        command += ["--output", str(self.folder / "out"), "--id-column", "name", "--address", self.cluster]
        command += ["--replicas", str(count), *SMALL_REPLICA, "--batch-size", "4"]
        command += ["--mode", "self_speculation", "--max-tokens", str(TOKENS), "--engine", json.dumps(ENGINE), *options]
        log = (self.folder / "log").open("a")
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)

    def results(self) -> list[dict[str, Any]]:
        parts = sorted((self.folder / "out").glob("part-*.jsonl"))
        return [json.loads(line) for part in parts for line in part.read_text().splitlines()]

    def log(self) -> str:
        return (self.folder / "log").read_text()


def pids_of(results: list[dict[str, Any]]) -> set[int]:
    """Return the replicas' process ids from the results, because Ray changes a process's title as it works."""
    return {int(row["replica"].rpartition(":")[2]) for row in results}


@pytest.fixture(scope="module")
def batch(ray_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Batch:
    folder = tmp_path_factory.mktemp("batch")
    texts = [text for _, text in held_out_prompts(ROWS - 1)] + [UNFIT]
    rows = [{"name": f"row {number}", "prompt": text} for number, text in enumerate(texts)]
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Batch(ray_cluster.address, folder)


@pytest.fixture(scope="module")
def interrupted(batch: Batch) -> Iterator[list[dict[str, Any]]]:
    """Two replicas: one is killed, the other continues, and then the driver is also killed."""
    driver = batch.start(2)
    try:
        wait_for(lambda: len(pids_of(batch.results())) == 2 or driver.poll() is not None, STARTS, "results", batch.log)
        assert driver.poll() is None, batch.log()[-3000:]
        victim, other = pids_of(batch.results())
        engines = engine_processes(victim), engine_processes(other)
        os.kill(victim, signal.SIGKILL)
        before = len(batch.results())
        wait_for(lambda: len(batch.results()) > before, SOON, "the other replica goes on")
        # At once, because rows must be left for the second run.
        driver.kill()
        driver.wait(SOON)
        wait_for(lambda: not alive(engines[0]), SOON, "the engine of a killed replica ends")
        wait_for(lambda: not alive([*engines[1]]) and not psutil.pid_exists(other), SOON, "all ends with the driver")
        yield batch.results()
    finally:
        driver.kill()


def test_interrupted_batch_keeps_complete_results(interrupted: list[dict[str, Any]]) -> None:
    assert 0 < len(interrupted) < ROWS
    assert max(Counter(row["id"] for row in interrupted).values()) == 1
    assert all(row["tokens"] and not row["error"] for row in interrupted)


def test_same_command_finishes_the_batch_after_its_engine_hangs(
    batch: Batch, interrupted: list[dict[str, Any]]
) -> None:
    driver = batch.start(1, "--hang-timeout", "8")
    try:
        wait_for(
            lambda: len(batch.results()) > len(interrupted) or driver.poll() is not None,
            STARTS,
            "more results",
            batch.log,
        )
        assert driver.poll() is None, batch.log()[-3000:]
        (replica,) = pids_of(batch.results()) - pids_of(interrupted)
        engine = engine_processes(replica)
        engine[0].suspend()
        took = wait_for(lambda: not psutil.pid_exists(replica), SOON, "a replica ends whose engine hangs")
        assert took > 2
        wait_for(lambda: not alive(engine), SOON, "and its engine with it")
        output, _ = driver.communicate(timeout=STARTS)  # its engine starts again
    finally:
        driver.kill()
    assert driver.returncode == 3, batch.log()[-3000:]  # one row was refused
    assert f"{len(interrupted)} of {ROWS} rows have a result already" in batch.log()
    results = {row["id"]: row for row in batch.results()}
    assert Counter(row["id"] for row in batch.results()) == Counter(f"row {number}" for number in range(ROWS))
    assert [results[row["id"]] for row in interrupted] == interrupted
    refused = results.pop(f"row {ROWS - 1}")
    assert "1024" in refused["error"]
    assert not refused["text"]
    assert all(row["tokens"] and not row["error"] for row in results.values())
    _check_texts(results)
    table = [line.split() for line in output.splitlines()]
    # Ray may print its workers' log lines in between.
    assert ["replica", "rows", "tokens", "tokens/s", "TPF"] in table
    ours = [line for line in table if line and line[0] in {row["replica"] for row in results.values()}]
    assert ours
    assert all(float(line[3]) > 0 and float(line[4]) > 1 for line in ours)  # tokens/s, TPF


def test_row_that_kills_every_engine_is_tried_only_a_few_times(ray_cluster: Cluster) -> None:
    import asyncio
    import importlib.util

    import pyarrow as pa

    spec = importlib.util.spec_from_file_location("ray_batch", EXAMPLES / "ray_batch.py")
    assert spec is not None and spec.loader is not None
    ray_batch = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ray_batch)
    attempts = ray_batch.Attempts.remote()
    tables = pa.table({"id": ["a", "b"], "prompt": ["x", "y"]})

    async def answers() -> list[list[dict[str, Any]]]:
        replica = object.__new__(ray_batch.Replica)
        replica.watch, replica.attempts, replica.started, replica.counts_forwards = object(), attempts, 0.0, False
        replica.rows = replica.tokens = 0

        async def complete(row: Any) -> dict[str, Any]:
            return {"id": row.id}

        replica.complete = complete
        return [(await replica(tables)).to_pylist() for _ in range(ray_batch.ATTEMPTS + 1)]

    *tried, given_up = asyncio.run(answers())
    assert all("abandoned" not in row for rows in tried for row in rows)
    assert given_up == [{"id": "a", "abandoned": True}, {"id": "b", "abandoned": True}]


def _check_texts(results: dict[str, dict[str, Any]]) -> None:
    """Self-speculation gives AR's text, from any replica and attempt."""
    from tokenizers import Tokenizer

    from vllm_nld.reference import ar_generate, load_reference

    tokenizer = Tokenizer.from_file(str(checkpoint_path("tiny") / "tokenizer.json"))
    model = load_reference(checkpoint_path("tiny"))
    prompts = held_out_prompts(ROWS - 1)
    for number in (0, ROWS // 2, ROWS - 2):
        ids = tokenizer.encode(prompts[number][1], add_special_tokens=False).ids
        row = results[f"row {number}"]
        expected = ar_generate(model, ids, TOKENS).ids[len(ids) :]
        assert row["text"] == tokenizer.decode(expected[: row["tokens"]])
