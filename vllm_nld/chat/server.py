"""A server for one person: the page's files, and a few paths of an OpenAI server, passed on as they are.

The page and the API then have one origin, so no CORS settings are needed. Standard library only: it also runs where
vLLM is not installed.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import select
import socket
import threading
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vllm_nld.errors import NLDError

PAGE = Path(__file__).parent / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
FILES = {f"/{file.name}": file for file in PAGE.iterdir()} | {"/": PAGE / "index.html"}
PASSED_ON = {("GET", "/v1/models"), ("POST", "/v1/chat/completions")}
"""What the page may ask of the server; nothing else is passed on."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ANY_ADDRESS = ("", "0.0.0.0", "::")
PATIENCE = 5.0
"""Seconds for a connection to the server. An answer may take any time: the page shows how long, and can stop it."""
LOOK = 0.25
"""Seconds between two looks at whether the page has gone."""
MOST_BYTES = 1 << 24
"""Of a request."""
POLICY = "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"


class Target:
    """The OpenAI server that requests are passed on to.

    Args:
        url: its root, as ``http://localhost:8000``; ``/v1`` at its end is dropped.
        api_key: sent as a bearer token; None: none.

    Raises:
        NLDError: the URL is none of HTTP or HTTPS.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        try:
            parts = urlsplit(self.url)
            self._host, self._port = parts.hostname, parts.port
        except ValueError:
            parts, self._host = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not self._host:
            raise NLDError(f"--url {url!r} is no address; allowed: one such as http://localhost:8000")
        self._secure, self._root = parts.scheme == "https", parts.path
        self._key = (api_key or "").strip()  # files of secrets end in a newline

    def connect(self) -> http.client.HTTPConnection:
        """Return an open connection.

        Raises:
            OSError: no server answers there.
        """
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host or "", self._port, timeout=PATIENCE)
        connection.connect()
        connection.sock.settimeout(None)
        return connection

    def ask(self, connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None) -> Any:
        """Send a request and return the response, whose body is still to be read."""
        headers = {"Content-Type": "application/json"} if body is not None else {}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        connection.request(method, self._root + path, body, headers)
        return connection.getresponse()


class Handler(BaseHTTPRequestHandler):
    """Answers one request of the page."""

    server: ChatServer
    timeout = 60.0

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if not self._is_meant():
            return
        if path in FILES:
            self._send_file(FILES[path])
        elif path == "/about":
            self._send_json(HTTPStatus.OK, {"url": self.server.target.url})
        else:
            self._pass_on("GET", path, None)

    def do_POST(self) -> None:
        if not self._is_meant():
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > MOST_BYTES:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a request of at most {MOST_BYTES} bytes is allowed")
            return
        self._pass_on("POST", urlsplit(self.path).path, self.rfile.read(int(length)))

    def _is_meant(self) -> bool:
        """Refuse what comes from other web sites: a page of theirs may send requests to a server on loopback."""
        origin = self.headers.get("Origin")
        try:
            host = urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
            of_this_page = origin is None or urlsplit(origin).netloc == self.headers.get("Host")
        except ValueError:
            host, of_this_page = "", False
        names = self.server.names
        if of_this_page and (host in names or (self.server.any_address and _is_address(host))):
            return True
        self._refuse(HTTPStatus.FORBIDDEN, f"allowed are requests of this page, at {' or '.join(names)}")
        return False

    def _send_file(self, file: Path) -> None:
        self._begin(HTTPStatus.OK, f"{TYPES[file.suffix]}; charset=utf-8")
        self.wfile.write(file.read_bytes())

    def _send_json(self, status: int, content: Any) -> None:
        self._begin(status, "application/json")
        self.wfile.write(json.dumps(content).encode())

    def _refuse(self, status: int, message: str) -> None:
        self._send_json(status, {"error": {"message": message, "code": int(status)}})

    def _begin(self, status: int, content_type: str) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": content_type,
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-store",
            "Connection": "close",
        }.items():
            self.send_header(name, value)
        self.end_headers()

    def _pass_on(self, method: str, path: str, body: bytes | None) -> None:
        if (method, path) not in PASSED_ON:
            self._refuse(HTTPStatus.NOT_FOUND, f"{method} {path} is not passed on")
            return
        target = self.server.target
        try:
            connection = target.connect()
        except OSError as error:
            self._refuse(HTTPStatus.BAD_GATEWAY, f"no server answers at {target.url} ({error.strerror or error})")
            return
        with contextlib.closing(connection), _hanging_up(self.connection, connection.sock):
            begun = False
            try:
                response = target.ask(connection, method, path, body)
                self._begin(response.status, response.headers.get("Content-Type", "application/json"))
                begun = True
                while part := response.read1(1 << 16):
                    self.wfile.write(part)
                    self.wfile.flush()
            except (OSError, ValueError, http.client.HTTPException) as error:
                if not begun:
                    with contextlib.suppress(OSError):  # it may be the page that has gone
                        why = f"{target.url} closed the connection ({type(error).__name__})"
                        self._refuse(HTTPStatus.BAD_GATEWAY, why)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: requests would fill the terminal in which the command runs."""


def _is_address(host: str) -> bool:
    """Whether a host is an IP address: a name may be another web site's, which has it resolve to this machine."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


@contextlib.contextmanager
def _hanging_up(page: socket.socket, server: socket.socket) -> Any:
    """Close the connection to the server as soon as the page closes its own, so that the server stops generating."""
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            try:
                readable, _, _ = select.select([page], [], [], LOOK)
                gone = bool(readable) and not page.recv(1, socket.MSG_PEEK)
            except (OSError, ValueError):
                gone = True
            if gone:
                with contextlib.suppress(OSError):
                    server.shutdown(socket.SHUT_RDWR)
                return
            if readable:
                over.wait(LOOK)  # it sent more than one request: there is only one answer to a connection

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


class ChatServer(ThreadingHTTPServer):
    """Serves the page.

    Args:
        target: where requests are passed on to.
        host: the address to listen at.
        port: 0 takes a free one.
        called: other names by which it may be called.

    Raises:
        NLDError: the address cannot be had.

    Attributes:
        names: hosts by which requests may call it.
        any_address: whether requests may also call it by any address.
    """

    daemon_threads = True

    def __init__(self, target: Target, host: str = LOOPBACK[0], port: int = 0, called: Sequence[str] = ()) -> None:
        self.target = target
        self.any_address = host in ANY_ADDRESS
        own = (*LOOPBACK, socket.gethostname().lower(), socket.getfqdn().lower())
        names = own if self.any_address else LOOPBACK if host.lower() in LOOPBACK else (host.lower(),)
        self.names = (*names, *map(str.lower, called))
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            raise NLDError(
                f"--host {host} --port {port} cannot be had ({error.strerror}); allowed: an address of this machine, "
                "and a port that no other process has"
            ) from error

    @property
    def url(self) -> str:
        """Where the page is."""
        host, port = self.server_address[:2]
        return f"http://{f'[{host!s}]' if ':' in str(host) else host!s}:{port}/"
