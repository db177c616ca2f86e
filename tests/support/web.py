"""An HTTP server on an archive, in a thread of the test's process, and a client for it."""

from __future__ import annotations

import functools
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import httpx

from sphere.catalog.index_folder import IndexFolder
from sphere.catalog.tables import CatalogTables
from sphere.conf.errors import CatalogError
from sphere.conf.settings import Settings
from sphere.scp.web.app import Services
from sphere.scp.web.server import listen, make_server, services_of


@dataclass
class Web:
    """A serving server."""

    settings: Settings
    port: int
    client: httpx.Client
    services: Services

    @property
    def url(self) -> str:
        """Of the DICOMweb service."""
        return f"http://127.0.0.1:{self.port}/dicom-web"

    def get(self, path: str, **named: object) -> httpx.Response:
        """GET of a path below /dicom-web."""
        return self.client.get(f"{self.url}{path}", **named)  # type: ignore[arg-type]


@contextmanager
def serving_web(settings: Settings, change: Callable[[Services], Services] = lambda same: same) -> Iterator[Web]:
    """HTTP on a free port of 127.0.0.1, stopped at the end; `change` puts other services in place."""
    settings = settings.model_copy(update={"web": settings.web.model_copy(update={"port": 0})})
    _index_made(settings)
    listener = listen(settings)
    port = int(listener.getsockname()[1])
    ready = threading.Event()
    with services_of(settings) as services:
        services = change(services)
        server = make_server(settings, services, ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        assert ready.wait(30)
        with httpx.Client(timeout=60, verify=_trusted()) as client:
            yield Web(settings, port, client, services)
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def _index_made(settings: Settings) -> None:
    """Have the index of what is catalogued there: who serves would start a process to make it, which takes three times
    as long, and is the subject of tests of its own."""
    tables = CatalogTables(settings)
    if settings.catalog.mode == "delta" and tables.is_local and tables.exists("bundles"):
        with suppress(CatalogError):
            IndexFolder(settings).make()


@functools.cache
def _trusted() -> ssl.SSLContext:
    """Read once: hundreds of servers have a client."""
    return httpx.create_ssl_context()


def until_closed(client: socket.socket) -> bytes:
    """All that comes before the other side closes."""
    client.settimeout(20)
    answer = b""
    while piece := client.recv(65536):
        answer += piece
    return answer
