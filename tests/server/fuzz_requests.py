"""Random requests over HTTP, most of them unsuitable: every answer is a 2xx or a 4xx, and the server stays alive.

By hand, against a server of its own (about five minutes for 2000 requests on two cores)::

    python -m tests.server.fuzz_requests --requests 2000 --seed 1

or against a running one, with ``--base-url http://127.0.0.1:8000``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.support import extremes
from tests.support.extremes import FLOATS, INTEGERS, JUNK
from tests.support.ports import reserved_port
from vllm_nld.checkpoints import checkpoint_path

RAW = [  # bodies that json.dumps would not write
    '{"a": ' * 50_000,
    '{"mode": ' + "[" * 50_000 + "]" * 50_000 + "}",
    '{"tokens_per_step": ' + "9" * 5000 + "}",
    '{"mode": "diffusion", "threshold": 1' + "0" * 400 + "}",
    '{"mode": "ar", "mode": "diffusion"}',
    '{"mode": "diffusion", "threshold": NaN}',
    "y" * 1_000_000,
    "null",
    "[]",
]
VLLMS: dict[str, list[Any]] = {
    "temperature": [0, 0.7, 1, 2, *FLOATS],
    "top_p": [0.5, 1, *FLOATS],
    "top_k": [-1, 5, *INTEGERS],
    "min_p": FLOATS,
    "seed": INTEGERS,
    "presence_penalty": [-2, 1, *FLOATS],
    "frequency_penalty": [-2, 1, *FLOATS],
    "repetition_penalty": [0.5, 1.5, 1e-300, *FLOATS],
    "min_tokens": [5, *INTEGERS],
    "logprobs": [0, 3, *INTEGERS],
    "stop_token_ids": [[1], [10**9], [-1], [2**63]],
    "allowed_token_ids": [[7], [7, 8, 9], [10**9], [-1], []],
    "logit_bias": [{"5": 100}, {"5": 1e308}, {"99999999": 1}, {"-1": 1}],
    "bad_words": [["a"], [""]],
    "stop": [["e"], "x", ""],
    "ignore_eos": [True],
    "n": [1, 2, 3, 0, 2**31],
    "thinking_token_budget": [0, 5, -1, *INTEGERS],
    "structured_outputs": [{"choice": ["yes", "no"]}, {"regex": "[ab]{1,9}"}, {"regex": "("}],
}


def xargs(rng: random.Random) -> Any:
    """The extension's own options, in one of their forms."""
    if rng.random() < 0.03:
        return {"nld": rng.choice(RAW)}
    if rng.random() < 0.03:
        return {
            rng.choice(["nld_mode", "NLD", "nld." + "k" * 100_000, "session_id", "\ud800"]): rng.choice(JUNK + INTEGERS)
        }
    nld = extremes.options(rng)
    return {f"nld.{key}": value for key, value in nld.items()} if rng.random() < 0.6 else {"nld": json.dumps(nld)}


def request(rng: random.Random, model: str) -> tuple[str, bytes]:
    """Return a path and a body."""
    body: dict[str, Any] = {"model": model, "max_tokens": rng.choice([1, 5, 20, 20, 40]), "vllm_xargs": xargs(rng)}
    for key in rng.sample(sorted(VLLMS), rng.choice([0, 0, 1, 1, 2, 4])):
        body[key] = rng.choice(VLLMS[key])
    if rng.random() < 0.2:
        body["stream"] = True
    if rng.random() < 0.3:
        body["messages"] = [{"role": "user", "content": "Write read."}]
        return "/v1/chat/completions", json.dumps(body).encode()
    body["prompt"] = "def read(self, size=-1):" * rng.choice([1, 1, 9])
    text = json.dumps(body)
    if rng.random() < 0.02:  # another body that json.dumps would not write
        text = rng.choice([text[:-1], '{"vllm_xargs":' + "[" * 50_000, text[:-1] + ', "seed": ' + "9" * 5000 + "}"])
    return "/v1/completions", text.encode()


def send(base_url: str, path: str, body: bytes) -> tuple[int, str]:
    """Return the status and the text of the answer; status 0 without an answer."""
    headers = {"Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(base_url + path, body, headers), timeout=120) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError as error:
        return 0, repr(error)


def fuzz(base_url: str, count: int, seed: int, at_once: int = 16) -> tuple[Counter[int], list[str]]:
    """Send ``count`` requests and return the number of each status, and a line for every fault."""
    rng = random.Random(seed)
    with urllib.request.urlopen(f"{base_url}/v1/models", timeout=10) as answer:
        model = json.load(answer)["data"][0]["id"]
    requests = [request(rng, model) for _ in range(count)]
    statuses, faults = Counter[int](), list[str]()
    with ThreadPoolExecutor(at_once) as pool:
        answers = pool.map(lambda item: send(base_url, *item), requests)
        for (path, body), (status, text) in zip(requests, answers, strict=True):
            statuses[status] += 1
            streamed_error = status == 200 and '"error"' in text and '"code": 4' not in text and '"code":4' not in text
            if status == 0 or status >= 500 or streamed_error:
                faults.append(f"{status} {path} {body[:300]!r} -> {text[:300]!r}")
            # vLLM echoes what its own validation refuses, before any of ours sees it.
            elif status >= 400 and "nld" in text and len(text) > 5000 and "validation error" not in text:
                faults.append(f"{status}, {len(text)} characters: {text[:200]!r}")
    return statuses, faults


def is_alive(base_url: str) -> bool:
    """Whether the server still answers a plain request."""
    with urllib.request.urlopen(f"{base_url}/v1/models", timeout=10) as answer:
        model = json.load(answer)["data"][0]["id"]
    return (
        send(base_url, "/v1/completions", json.dumps({"model": model, "prompt": "x", "max_tokens": 4}).encode())[0]
        == 200
    )


def serve(port: int, log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Start ``vllm serve`` on the embedded checkpoint and wait until it answers."""
    command = [str(Path(sys.executable).parent / "vllm"), "serve", str(checkpoint_path("tiny")), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--speculative-config", '{"model": "vllm_nld.SelfSpeculation"}']
    command += ["--dtype", "float32", "--max-model-len", "2048", "--kv-cache-memory-bytes", str(1 << 28)]
    command += ["--reasoning-parser", "nemotron_v3", "--enforce-eager"]  # speed does not matter here
    # In its own session, so that the engine's processes can be ended with it.
    server = subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT, start_new_session=True)
    base_url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{base_url}/health", timeout=2)
            return server, base_url
        except OSError:
            if server.poll() is not None:
                break
            time.sleep(1)
    stop(server)
    raise SystemExit(f"the server does not start, see {log}")


def stop(server: subprocess.Popen[bytes]) -> None:
    """End a server and its engine's processes."""
    server.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--base-url", help="of a running server; else one is started")
    parser.add_argument(
        "--log",
        type=Path,
        default=Path(tempfile.gettempdir()) / "fuzz_server.log",
        help="of the server that is started",
    )
    options = parser.parse_args()
    with reserved_port() as port:
        server, base_url = (None, options.base_url) if options.base_url else serve(port, options.log)
        try:
            statuses, faults = fuzz(base_url, options.requests, options.seed, options.at_once)
            alive = is_alive(base_url)
        finally:
            if server is not None:
                stop(server)
    for fault in faults:
        print(fault)
    by_status = ", ".join(f"{status}: {count}" for status, count in sorted(statuses.items()))
    print(f"{options.requests} requests, seed {options.seed}; answers by status: {by_status}; server alive: {alive}")
    if faults or not alive:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
