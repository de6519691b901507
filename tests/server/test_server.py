"""A real ``vllm serve`` on loopback with self-speculation on, through the official openai client."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from vllm_nld.checkpoints import checkpoint_path
from vllm_nld.checkpoints.held_out import held_out_prompts

BIN = Path(sys.executable).parent
SPECULATE = {"vllm_xargs": {"nld.mode": "self_speculation"}}  # auto mode, the default, may choose AR
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
    # A model this small would fill an answer with white space, which a JSON grammar allows without end.
    command += ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']
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


def metric(base_url: str, name: str, label: str = "") -> float:
    """A metric's value, summed over the series that carry ``label``."""
    text = urllib.request.urlopen(f"{base_url}/metrics", timeout=10).read().decode()
    lines = [line for line in text.splitlines() if line.startswith(f"{name}{{") or line.startswith(f"{name}_total{{")]
    lines = [line for line in lines if label in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def test_completions_streamed_and_not(client: OpenAI, model: str, base_url: str) -> None:
    from vllm_nld.reference import ar_generate, load_reference

    ((_, prompt),) = held_out_prompts(1)
    settings = {"model": model, "prompt": prompt, "max_tokens": 48, "temperature": 0.0, "extra_body": SPECULATE}
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


@pytest.mark.parametrize(
    "spelling",
    [lambda mode: {"nld.mode": mode}, lambda mode: {"nld": json.dumps({"mode": mode})}],
    ids=["flat", "json"],
)
def test_every_mode_on_one_server(client: OpenAI, model: str, spelling: Callable[[str], dict[str, str]]) -> None:
    ((_, prompt),) = held_out_prompts(1)
    texts = {}
    for mode in ("ar", "self_speculation", "auto", "diffusion"):
        settings = {"model": model, "prompt": prompt, "max_tokens": 48, "temperature": 0.0}
        settings["extra_body"] = {"vllm_xargs": spelling(mode)}
        completion = client.completions.create(**settings)
        texts[mode] = completion.choices[0].text
        assert completion.usage is not None
        assert completion.usage.completion_tokens == 48
        streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**settings, stream=True))
        assert streamed == texts[mode]
    assert texts["ar"] == texts["self_speculation"] == texts["auto"]


@pytest.mark.parametrize(
    ("xargs", "words"),
    [
        ({"nld.mode": "fast"}, ["mode='fast'", "'self_speculation'"]),
        ({"nld.speed": 3}, ["speed=3", "unknown", "allowed keys"]),
        ({"nld": '{"mode": "ar", "threshold": 0.5}'}, ["threshold=0.5", "no effect in mode 'ar'"]),
        ({"nld.mode": "diffusion", "nld.block_length": 64}, ["block_length=64", "2 to 16"]),
        ({"nld": "diffusion"}, ["'diffusion'", "JSON"]),
    ],
)
def test_an_unsuitable_mode_is_http_400(client: OpenAI, model: str, xargs: dict[str, Any], words: list[str]) -> None:
    from openai import BadRequestError

    for create, ask in (
        (client.completions.create, {"prompt": "x"}),
        (client.chat.completions.create, {"messages": [{"role": "user", "content": "x"}]}),
    ):
        with pytest.raises(BadRequestError) as caught:
            create(model=model, max_tokens=4, extra_body={"vllm_xargs": xargs}, **ask)
        for word in words:
            assert word in str(caught.value)
    assert client.completions.create(model=model, prompt="x", max_tokens=4).choices[0].text


def test_json_schemas_are_kept_in_every_mode(client: OpenAI, model: str) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 2, 3]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    for mode in ("ar", "self_speculation", "diffusion", "auto"):
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Pick."}],
            response_format={"type": "json_schema", "json_schema": {"name": "pick", "schema": schema}},
            max_tokens=100,
            extra_body={"vllm_xargs": {"nld.mode": mode}},
        )
        assert json.loads(answer.choices[0].message.content or "")["n"] in (1, 2, 3), mode


def test_metrics_tell_the_modes_apart(client: OpenAI, model: str, base_url: str) -> None:
    ((_, prompt),) = held_out_prompts(1)

    def tokens_of(mode: str) -> float:
        return metric(base_url, "vllm:nld_tokens", f'mode="{mode}"')

    for mode in ("ar", "self_speculation", "diffusion"):
        before = tokens_of(mode)
        settings = {"model": model, "prompt": prompt, "max_tokens": 40, "temperature": 0.0}
        client.completions.create(**settings, extra_body={"vllm_xargs": {"nld.mode": mode}})
        for _ in range(50):  # the last values come with the step that tells the worker of the request's end
            if tokens_of(mode) >= before + 39:
                break
            time.sleep(0.1)
        # The last token may come by a plain step; no more than a block is decided in excess.
        assert before + 39 <= tokens_of(mode) <= before + 40 + 16
    for kind in ("prefill", "ar", "draft", "verify", "denoise", "commit"):
        assert metric(base_url, "vllm:nld_request_forwards", f'kind="{kind}"') > 0
    assert metric(base_url, "vllm:nld_model_forwards", 'pass="draft"') > 0
    assert metric(base_url, "vllm:nld_tokens_per_forward", 'mode="self_speculation"') > 0.5
    assert metric(base_url, "vllm:nld_acceptance_length") >= 1
    assert metric(base_url, "vllm:nld_denoising_passes") > 0


def test_the_example_client(base_url: str) -> None:
    command = [sys.executable, str(EXAMPLES / "openai_client.py"), "--base-url", f"{base_url}/v1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_bench_serve_prints_acceptance(base_url: str, model: str) -> None:
    command = [str(BIN / "vllm"), "bench", "serve", "--model", model, "--base-url", base_url]
    command += ["--dataset-name", "random", "--random-input-len", "32", "--random-output-len", "32"]
    command += ["--num-prompts", "4", "--extra-body", json.dumps(SPECULATE)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "Acceptance length" in result.stdout
