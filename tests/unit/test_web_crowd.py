"""Connections that are too many: who has most of them gives way, and who is refused is told so as a problem."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from sphere.scp.web.server import MAX_OF_ONE, MAX_REQUESTS
from tests.support.landing import archive
from tests.support.web import Web, serving_web

pytestmark = pytest.mark.unit


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    with serving_web(archive(tmp_path)) as running:
        running.client.close()
        yield running


@contextmanager
def idle(web: Web, address: str, count: int) -> Iterator[list[socket.socket]]:
    """Connections from an address of this host that say nothing, all of them accepted."""
    with ExitStack() as stack:
        held = [
            stack.enter_context(socket.create_connection(("127.0.0.1", web.port), source_address=(address, 0)))
            for _ in range(count)
        ]
        asked(web, "127.0.0.99")  # accepted after them
        yield held


def asked(web: Web, address: str) -> httpx.Response:
    with httpx.Client(transport=httpx.HTTPTransport(local_address=address), timeout=20) as client:
        return client.get(f"http://127.0.0.1:{web.port}/healthz")


def ended(held: list[socket.socket]) -> int:
    """How many the server has closed."""
    found = 0
    for one in held:
        one.setblocking(False)
        try:
            found += one.recv(1) == b""
        except BlockingIOError:
            continue
        except ConnectionResetError:
            found += 1
    return found


def test_one_address_does_not_take_all(web: Web) -> None:
    with idle(web, "127.0.0.2", MAX_REQUESTS + 50) as held:
        response = asked(web, "127.0.0.2")
        assert response.status_code == 503
        assert response.headers["content-type"] == "application/problem+json"
        assert response.headers["retry-after"] == "1"
        assert response.json()["title"] == "Service Unavailable"
        assert f"{MAX_OF_ONE} connections" in response.json()["detail"]
        assert asked(web, "127.0.0.3").status_code == 200
        held[0].sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert held[0].recv(100).startswith(b"HTTP/1.1 200 "), "those before are served"


def test_where_all_places_are_taken_an_idle_one_is_given_up(web: Web) -> None:
    """One of the address that has most, whoever comes."""
    rest = MAX_REQUESTS - MAX_OF_ONE
    with (
        idle(web, "127.0.0.2", MAX_OF_ONE) as most,
        idle(web, "127.0.0.3", rest // 2) as some,
        idle(web, "127.0.0.4", rest - rest // 2) as more,
    ):
        for number in range(10):
            assert asked(web, f"127.0.0.{10 + number}").status_code == 200
        assert ended(most) >= 1 and ended(some) == ended(more) == 0


def test_those_that_are_refused_are_not_kept_without_end(web: Web) -> None:
    """However many come from one address."""
    with idle(web, "127.0.0.2", MAX_OF_ONE + MAX_REQUESTS + 40) as held:
        assert ended(held[:MAX_OF_ONE]) == 0
        assert ended(held[MAX_OF_ONE:]) >= 39
        assert asked(web, "127.0.0.3").status_code == 200
