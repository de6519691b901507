"""``vllm-nld chat``: serves the page until it is stopped."""

from __future__ import annotations

import contextlib

import typer

from vllm_nld.chat.server import ChatServer, Target


def run(url: str, host: str, port: int, api_key: str | None) -> None:
    """Serve the page at ``host`` and ``port`` for the server at ``url``; Ctrl+C ends it."""
    server = ChatServer(Target(url, api_key), host, port)
    typer.echo(f"Open {server.url} in a browser. It talks to {server.target.url}. Ctrl+C ends it.")
    with server, contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
