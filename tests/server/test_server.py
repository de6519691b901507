"""A real ``vllm serve`` on loopback with self-speculation on, through the official openai client."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from vllm_nld.checkpoints import checkpoint_path
from vllm_nld.checkpoints.held_out import held_out_prompts

BIN = Path(sys.executable).parent
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def base_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [str(BIN / "vllm"), "serve", str(checkpoint_path("tiny")), "--port", str(port), "--host", "127.0.0.1"]
    command += ["--speculative-config", '{"model": "vllm_nld.SelfSpeculation"}', "--dtype", "float32"]
    command += ["--max-model-len", "2048", "--kv-cache-memory-bytes", str(1 << 28)]
    # The environment of the in-process tests must not leak into what a user would start.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                assert server.poll() is None, log.read_text()[-3000:]
                time.sleep(1)
        assert "Self-speculation is active" in log.read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture(scope="module")
def client(base_url: str) -> OpenAI:
    return OpenAI(base_url=f"{base_url}/v1", api_key="none", timeout=120)


@pytest.fixture(scope="module")
def model(client: OpenAI) -> str:
    return client.models.list().data[0].id


def metric(base_url: str, name: str) -> float:
    text = urllib.request.urlopen(f"{base_url}/metrics", timeout=10).read().decode()
    lines = [line for line in text.splitlines() if line.startswith(f"{name}{{") or line.startswith(f"{name}_total{{")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def test_completions_streamed_and_not(client: OpenAI, model: str, base_url: str) -> None:
    from vllm_nld.reference import ar_generate, load_reference

    ((_, prompt),) = held_out_prompts(1)
    settings = {"model": model, "prompt": prompt, "max_tokens": 48, "temperature": 0.0}
    before = metric(base_url, "vllm:spec_decode_num_accepted_tokens")
    whole = client.completions.create(**settings)
    assert metric(base_url, "vllm:spec_decode_num_accepted_tokens") > before
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**settings, stream=True))
    assert streamed == whole.choices[0].text
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint_path("tiny") / "tokenizer.json"))
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    reference = ar_generate(load_reference(checkpoint_path("tiny")), ids, 48).ids[len(ids) :]
    assert whole.choices[0].text == tokenizer.decode(reference)


def test_chat_streamed_and_not(client: OpenAI, model: str) -> None:
    messages = [{"role": "user", "content": "Write the Python function read."}]
    settings = {"model": model, "messages": messages, "max_tokens": 48, "temperature": 0.0}
    whole = client.chat.completions.create(**settings)
    chunks = client.chat.completions.create(**settings, stream=True)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == whole.choices[0].message.content
    assert streamed


def test_a_cut_off_stream_leaves_the_server_healthy(client: OpenAI, model: str) -> None:
    ((_, prompt),) = held_out_prompts(1)
    settings = {"model": model, "prompt": prompt, "temperature": 0.0}
    stream = client.completions.create(**settings, max_tokens=1000, stream=True)
    next(iter(stream))
    stream.close()
    first, second = (client.completions.create(**settings, max_tokens=16).choices[0].text for _ in range(2))
    assert first == second


def test_bad_requests_are_refused(client: OpenAI, model: str) -> None:
    from openai import BadRequestError

    with pytest.raises(BadRequestError):
        client.completions.create(model=model, prompt="x", max_tokens=100_000)


def test_the_example_client(base_url: str) -> None:
    command = [sys.executable, str(EXAMPLES / "openai_client.py"), "--base-url", f"{base_url}/v1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_bench_serve_prints_acceptance(base_url: str, model: str) -> None:
    command = [str(BIN / "vllm"), "bench", "serve", "--model", model, "--base-url", base_url]
    command += ["--dataset-name", "random", "--random-input-len", "32", "--random-output-len", "32"]
    result = subprocess.run([*command, "--num-prompts", "4"], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "Acceptance length" in result.stdout
