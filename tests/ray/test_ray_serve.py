"""examples/ray_serve.py, as a user runs it: every mode, a second replica under load, a replica and an engine killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import psutil
import pytest
from openai import OpenAI

from tests.support.clusters import EXAMPLES, SMALL_REPLICA, Cluster
from tests.support.ports import reserved_port
from tests.support.processes import SOON, STARTS, alive, engine_processes, wait_for
from vllm_nld.checkpoints import checkpoint_path
from vllm_nld.checkpoints.held_out import held_out_prompts

MODEL = str(checkpoint_path("tiny"))
pytestmark = pytest.mark.timeout(1800)

LONGEST = SOON
"""Limit of a request's seconds, also when processes die."""
ASKED_EVERY = 0.5
"""Seconds between two looks at the replicas: they load Ray Serve's controller."""
ANSWERED = 5
"""Requests that show that the service answers. They are few, because they take all of both cores."""


@dataclass
class Service:
    process: subprocess.Popen[bytes]
    url: str
    log: Path


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with reserved_port() as port:
        yield port


@pytest.fixture(scope="module")
def service(ray_cluster: Cluster, port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One replica, or two under load."""
    command = [
        sys.executable,
        str(EXAMPLES / "ray_serve.py"),
        "--address",
        ray_cluster.address,
        "--port",
        str(port),
    ]
    command += ["--min-replicas", "1", "--max-replicas", "2", "--target-requests", "1", "--upscale-delay", "0"]
    command += [*SMALL_REPLICA, "--hang-timeout", "30", "--drain", "1", "--", MODEL]
    command += ["--speculative-config", '{"model": "vllm_nld.SelfSpeculation"}', "--dtype", "float32"]
    command += ["--max-model-len", "1024", "--kv-cache-memory-bytes", str(1 << 27), "--enforce-eager"]
    path = tmp_path_factory.mktemp("serve") / "log"
    with path.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        ready = f"ready at http://127.0.0.1:{port}/v1"
        wait_for(lambda: ready in path.read_text() or process.poll() is not None, STARTS, "ready", path.read_text)
        assert process.poll() is None, path.read_text()[-3000:]
        yield Service(process, f"http://127.0.0.1:{port}/v1", path)
        serving = [pid for _, pid in states() if pid is not None]
    finally:
        process.terminate()
        process.wait(SOON)
    assert serving
    wait_for(lambda: not any(map(psutil.pid_exists, serving)), SOON, "no replica is left")


@pytest.fixture(scope="module")
def client(service: Service) -> OpenAI:
    return OpenAI(base_url=service.url, api_key="none", timeout=2 * LONGEST, max_retries=0)


def test_every_mode_streamed_and_not(client: OpenAI) -> None:
    ((_, prompt),) = held_out_prompts(1)
    texts = {}
    for mode in ("ar", "self_speculation", "auto", "diffusion"):
        settings = {"model": MODEL, "prompt": prompt, "max_tokens": 32, "temperature": 0.0}
        settings["extra_body"] = {"vllm_xargs": {"nld.mode": mode}}
        texts[mode] = client.completions.create(**settings).choices[0].text
        chunks = [chunk.choices[0].text for chunk in client.completions.create(**settings, stream=True)]
        assert "".join(chunks) == texts[mode]
        assert len(chunks) > 1
    assert texts["ar"] == texts["self_speculation"] == texts["auto"] != texts["diffusion"]
    messages = [{"role": "user", "content": "Write the Python function read."}]
    answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=16, temperature=0.0)
    assert answer.choices[0].message.content


def test_unsuitable_mode_is_http_400(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="'self_speculation'"):
        client.completions.create(model=MODEL, prompt="x", extra_body={"vllm_xargs": {"nld.mode": "fast"}})


class Load:
    """Successive streams in several threads, with the seconds and the error (or None) of each.

    Only the first ``active`` threads send requests, ``pause`` seconds after the last one's end.
    """

    def __init__(self, client: OpenAI, threads: int, max_tokens: int) -> None:
        self.client, self.max_tokens, self.active, self.pause = client, max_tokens, threads, 0.0
        self.outcomes: list[tuple[float, Exception | None]] = []
        self.ended = threading.Event()
        self.threads = [threading.Thread(target=self.run, args=[number], daemon=True) for number in range(threads)]
        for thread in self.threads:
            thread.start()

    def run(self, number: int) -> None:
        while not self.ended.is_set():
            if number >= self.active:
                time.sleep(0.1)
                continue
            started, error = time.monotonic(), None
            try:
                settings = {"model": MODEL, "prompt": "def", "max_tokens": self.max_tokens, "stream": True}
                settings["extra_body"] = {"ignore_eos": True}
                last = None
                for chunk in self.client.completions.create(**settings, temperature=0.0):
                    last = chunk.choices[0].finish_reason
                if last != "length":
                    error = AssertionError(f"a stream ended without a word, its last finish_reason {last!r}")
            except Exception as caught:
                error = caught
                time.sleep(0.2)  # as clients do
            self.outcomes.append((time.monotonic() - started, error))
            self.ended.wait(self.pause)

    def count(self, failed: bool) -> int:
        return sum((error is not None) == failed for _, error in self.outcomes)

    def stop(self) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join(LONGEST)
            assert not thread.is_alive(), "a request hangs"


def test_load_adds_a_replica_and_killed_replicas_are_replaced(client: OpenAI, service: Service) -> None:
    load = Load(client, threads=4, max_tokens=120)
    try:
        two = "STARTING", "RUNNING"
        wait_for(lambda: len(replicas_that(*two)) == 2, STARTS, "a second replica starts", states, every=ASKED_EVERY)
        _wait_for_two(load, service)
        _finish(load, ANSWERED)
        assert not load.count(failed=True)
        seconds = _kill_a_replica(load, service)
        print(f"another replica was ready {seconds:.0f} s after one was killed")
        _finish(load, ANSWERED)
        _kill_an_engine(load)
    finally:
        load.stop()
    errors = [error for _, error in load.outcomes if error is not None]
    print(len(load.outcomes), "requests", *{f"{type(error).__name__}: {error}"[:300] for error in errors}, sep="\n")
    assert all(isinstance(error, openai.OpenAIError) for error in errors), errors
    assert max(seconds for seconds, _ in load.outcomes) < LONGEST
    assert client.completions.create(model=MODEL, prompt="x", max_tokens=4).choices[0].text


def states() -> list[tuple[str, int | None]]:
    """Return the state of every replica in Ray Serve's words, and its process id (None until it serves)."""
    from ray.serve.context import _get_global_client

    application = _get_global_client().get_serve_details()["applications"]["nld"]
    found = application["deployments"]["NLDServer"]["replicas"]
    return [(str(getattr(one["state"], "value", one["state"])), one.get("pid")) for one in found]


def replicas_that(*wanted: str) -> list[int | None]:
    """Return the process ids of the replicas in one of some states."""
    return [pid for state, pid in states() if state in wanted]


def _wait_for_two(load: Load, service: Service, gone: int | None = None) -> None:
    """Wait until two replicas serve other than ``gone``, whose end Ray may not have noticed yet.

    Meanwhile one thread sends requests now and then. More would leave little of two cores for the start, which would
    then take minutes. Ray keeps its number of replicas for 300 s (``--downscale-delay``).
    """
    load.active, load.pause = 1, 5.0
    wait_for(
        lambda: len(found := replicas_that("RUNNING")) == 2 and gone not in found,
        STARTS,
        "two replicas serve",
        lambda: f"{states()}\n{service.log.read_text()[-3000:]}",
        every=ASKED_EVERY,
    )
    load.active, load.pause = len(load.threads), 0.0


def _finish(load: Load, count: int) -> None:
    target = load.count(failed=False) + count
    wait_for(lambda: load.count(failed=False) >= target, LONGEST, f"{count} requests are answered")


def _kill_a_replica(load: Load, service: Service) -> float:
    """Kill one of two while both have requests in flight; return the seconds until two serve again."""
    victim, other = replicas_that("RUNNING")
    engine = engine_processes(victim)
    started = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: not alive(engine), SOON, "the engine of a killed replica ends")
    wait_for(lambda: load.count(failed=True) > 0, SOON, "its requests fail")
    _finish(load, ANSWERED)
    assert load.count(failed=True) < len(load.threads), "requests of the other replica also failed"
    assert psutil.pid_exists(other)
    _wait_for_two(load, service, gone=victim)
    return time.monotonic() - started


def _kill_an_engine(load: Load) -> None:
    victim, other = replicas_that("RUNNING")
    failed = load.count(failed=True)
    engine_processes(victim)[0].kill()
    wait_for(lambda: not psutil.pid_exists(victim), SOON, "a replica ends with its engine")
    _finish(load, ANSWERED)
    assert load.count(failed=True) > failed
    assert psutil.pid_exists(other)
