"""A port for a server that a test starts."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """Yield a port of 127.0.0.1 that no other process gets, and that a server can have all the same.

    The server must set ``SO_REUSEADDR``, as vLLM does, or ``SO_REUSEPORT`` too, as Ray Serve does. This socket never
    listens, so the server gets all connections.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]
