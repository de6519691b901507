"""The small server of ``vllm-nld chat``: what it passes on, and what it refuses."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.stand_in import StandIn, running, standing_in
from vllm_nld.chat.server import ChatServer, Target
from vllm_nld.errors import NLDError


@pytest.fixture
def upstream() -> Iterator[StandIn]:
    with standing_in() as server:
        yield server


@pytest.fixture
def page(upstream: StandIn) -> Iterator[ChatServer]:
    with ChatServer(Target(f"{upstream.url}/v1", "secret")) as server, running(server):
        yield server


def ask(server: ChatServer, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str, Any]:
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=30)
    try:
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, response.read().decode(), response.headers
    finally:
        connection.close()


def test_page_is_served_with_a_policy_that_keeps_others_out(page: ChatServer) -> None:
    for path, kind in (("/", "text/html"), ("/app.js", "text/javascript"), ("/style.css", "text/css")):
        status, text, headers = ask(page, "GET", path)
        assert (status, headers["Content-Type"]) == (200, f"{kind}; charset=utf-8")
        assert text
        assert "default-src 'self'" in headers["Content-Security-Policy"]


def test_requests_are_passed_on_with_the_key(page: ChatServer, upstream: StandIn) -> None:
    assert json.loads(ask(page, "GET", "/v1/models")[1])["data"][0]["id"] == "stand-in"
    status, text, headers = ask(page, "POST", "/v1/chat/completions", {"vllm_xargs": {}})
    assert (status, headers["Content-Type"]) == (200, "text/event-stream")
    assert text.count("data: {") == 5
    assert upstream.headers[0]["Authorization"] == "Bearer secret"


def test_refusals_are_passed_on(page: ChatServer, upstream: StandIn) -> None:
    upstream.behavior = "refuse"
    status, text, _ = ask(page, "POST", "/v1/chat/completions", {"vllm_xargs": {}})
    assert (status, "speed=3 is unknown" in text) == (400, True)


@pytest.mark.parametrize("path", ["/v1/completions", "/metrics", "/../server.py", "/server.py", "//etc/passwd"])
def test_nothing_else_is_passed_on_or_served(page: ChatServer, upstream: StandIn, path: str) -> None:
    for method, body in (("GET", None), ("POST", {})):
        assert ask(page, method, path, body)[0] == 404
    assert not upstream.requests


@pytest.mark.parametrize(
    "headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}], ids=["host", "origin"]
)
def test_other_sites_are_kept_out(page: ChatServer, upstream: StandIn, headers: dict[str, str]) -> None:
    assert ask(page, "POST", "/v1/chat/completions", {"vllm_xargs": {}}, **headers)[0] == 403
    assert not upstream.requests


def test_server_stops_when_the_page_goes(page: ChatServer, upstream: StandIn) -> None:
    upstream.behavior = "slow"
    connection = http.client.HTTPConnection(*page.server_address[:2], timeout=30)
    connection.request("POST", "/v1/chat/completions", json.dumps({"vllm_xargs": {}}))
    connection.getresponse()
    connection.sock.shutdown(socket.SHUT_RDWR) if connection.sock else connection.close()
    assert upstream.hung_up.wait(30)


def test_dead_server_is_a_502_that_names_it() -> None:
    with socket.socket() as held:  # bound, but not listening
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}"
        with ChatServer(Target(url)) as server, running(server):
            status, text, _ = ask(server, "GET", "/v1/models")
    assert status == 502
    assert f"no server answers at {url} (Connection refused)" in json.loads(text)["error"]["message"]


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://localhost", "http://", "http://host:port", "http://[::1"])
def test_unsuitable_address_is_refused(url: str) -> None:
    with pytest.raises(NLDError, match=r"--url .* is no address; allowed: one such as http://localhost:8000"):
        Target(url)


def test_taken_port_is_refused(page: ChatServer) -> None:
    with pytest.raises(NLDError, match=r"--port \d+ cannot be had"):
        ChatServer(page.target, port=page.server_address[1])


def test_page_for_other_machines_answers_by_address_and_by_allowed_names(upstream: StandIn) -> None:
    """As in a container. Another site's name may resolve to this machine: its pages are still kept out."""
    with ChatServer(Target(upstream.url), host="0.0.0.0", called=["WorkStation"]) as server, running(server):
        for name in ("workstation:8080", "192.0.2.7:8080", f"{socket.gethostname()}:8080", "localhost:8080"):
            assert ask(server, "GET", "/v1/models", Host=name)[0] == 200, name
            assert ask(server, "GET", "/v1/models", Host=name, Origin=f"http://{name}")[0] == 200, name
            assert ask(server, "GET", "/v1/models", Host=name, Origin="http://evil.example")[0] == 403, name
        evil = {"Host": "evil.example:8080", "Origin": "http://evil.example:8080"}
        assert ask(server, "GET", "/v1/models", **evil)[0] == 403
        assert ask(server, "GET", "/", Host="[")[0] == 403


def test_names_and_keys_may_be_written_as_people_do(upstream: StandIn) -> None:
    """A file of a secret ends in a newline; the browser sends names in lower case."""
    with ChatServer(Target(upstream.url, "secret\n"), host="LocalHost") as server, running(server):
        assert ask(server, "POST", "/v1/chat/completions", {"vllm_xargs": {}})[0] == 200
    assert upstream.headers[-1]["Authorization"] == "Bearer secret"
