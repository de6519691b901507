"""A real ``vllm serve`` with self-speculation on."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.support.startup.quick_start import FORK

BIN = Path(sys.executable).parent


@contextlib.contextmanager
def serving(arguments: list[str], port: int, log: Path, fork: bool = False) -> Iterator[None]:
    """Serve a checkpoint in float32 on loopback; ``arguments`` are the checkpoint and further options.

    ``fork`` the engine core from the server: it need not import vLLM again. ``vllm serve`` itself spawns it.
    """
    command = [str(BIN / "vllm"), "serve", *arguments, "--port", str(port), "--host", "127.0.0.1"]
    command += ["--speculative-config", '{"model": "vllm_nld.SelfSpeculation"}', "--dtype", "float32"]
    # The environment of the in-process tests must not leak into the server.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    environment["VLLM_LOGGING_LEVEL"] = "DEBUG"  # for the line per request
    if fork:
        environment[FORK] = "1"
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        for _ in range(480):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                assert server.poll() is None, log.read_text()[-3000:]
                time.sleep(1)
        yield
    finally:
        server.terminate()
        server.wait(60)
