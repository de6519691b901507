"""A stand-in for a vLLM server, which answers as it is told: for what a real one does too seldom."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

STORY = [("Once", "ar"), (" upon", "drafted"), (" a", "looked_up"), (" time", "corrected"), (".", "bonus")]


class StandIn(ThreadingHTTPServer):
    """Attributes: requests it got, what it does with the next ones, and how many streams were broken by the caller."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.behavior = "answer"
        self.hung_up = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_GET(self) -> None:
        self._json(200, {"data": [{"id": "stand-in"}]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        self.server.headers.append(dict(self.headers))
        behavior = self.server.behavior
        if behavior == "refuse":
            self._json(400, {"error": {"message": 'extra_args["nld"].speed=3 is unknown; allowed keys: mode'}})
        elif behavior == "refuse in the stream":  # as vLLM does: by then it has begun the answer
            self._begin()
            refusal = {"error": {"message": 'extra_args["nld"].speed=3 is unknown; allowed keys: mode', "code": 400}}
            self.wfile.write(f"data: {json.dumps(refusal)}\n\ndata: [DONE]\n\n".encode())
        elif behavior == "no report" and "nld.report" in request["vllm_xargs"]:
            self._json(400, {"error": {"message": 'extra_args["nld"].report=True with a server started without'}})
        elif behavior == "break":
            self._begin()
            self._chunk(*STORY[0])
        else:
            self._begin()
            if behavior in ("slow", "stop after a token"):
                if behavior != "slow":
                    self._chunk(*STORY[0])
                self._wait()
                return
            for token in STORY:
                self._chunk(*token, told=behavior != "no report")
                time.sleep(0.02)
            self.wfile.write(b"data: [DONE]\n\n")

    def _wait(self) -> None:
        """Say nothing until the caller goes, as a server does with a long queue."""
        self.connection.settimeout(60)
        with contextlib.suppress(OSError):
            if not self.connection.recv(1):
                self.server.hung_up.set()

    def _begin(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()

    def _chunk(self, text: str, origin: str, told: bool = True) -> None:
        chunk: dict[str, Any] = {"choices": [{"index": 0, "delta": {"content": text}}]}
        if told:
            figures = {"tokens_per_forward": 2.5, "acceptance_length": 3.0, "forwards": {"verify": 1}}
            chunk["nld"] = {"tokens": [{"id": 1, "text": text, "origin": origin}], **figures}
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.flush()

    def _json(self, status: int, content: Any) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


@contextlib.contextmanager
def standing_in() -> Iterator[StandIn]:
    """Yield a stand-in that runs."""
    with StandIn() as server, running(server):
        yield server


@contextlib.contextmanager
def running(server: Any) -> Iterator[Any]:
    """Serve in a thread."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
