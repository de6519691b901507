"""``vllm-nld chat``: serves the page until it is stopped."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import typer

from vllm_nld.chat.server import ChatServer, Target


def run(url: str, host: str, port: int, called: Sequence[str], api_key: str | None) -> None:
    """Serve the page at ``host`` and ``port``, also ``called`` otherwise, for the server at ``url``; Ctrl+C ends it."""
    server = ChatServer(Target(url, api_key), host, port, called)
    typer.echo(f"Open {server.url} in a browser. It talks to {server.target.url}. Ctrl+C ends it.")
    with server, contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
