"""A reserved port is the server's, and no other process's."""

from __future__ import annotations

import socket

import pytest

from tests.support.ports import reserved_port


@pytest.mark.parametrize("also_port", [False, True], ids=["vLLM's server", "Ray Serve's"])
def test_a_reserved_port_takes_a_server_and_no_other_socket(also_port: bool) -> None:
    with reserved_port() as port, socket.socket() as server, socket.socket() as other, socket.socket() as client:
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if also_port:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        server.bind(("127.0.0.1", port))
        server.listen()
        client.connect(("127.0.0.1", port))
        server.accept()[0].close()
