"""An HTTP server on an archive, in a thread of the test's process, and a client for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import httpx

from sphere.catalog.service import QueryService
from sphere.conf.settings import Settings
from sphere.ingest.spool import open_readable, open_writer
from sphere.scp.policy import Policy
from sphere.scp.retrieve.transcoder import Transcoder
from sphere.scp.store import StoreService
from sphere.scp.web.app import Services
from sphere.scp.web.archive import Archive
from sphere.scp.web.server import listen, make_server


@dataclass
class Web:
    """A serving server."""

    settings: Settings
    port: int
    client: httpx.Client
    finder: QueryService

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
    listener = listen(settings)
    port = int(listener.getsockname()[1])
    ready = threading.Event()
    with (
        QueryService(settings) as finder,
        closing(Transcoder()) as transcoder,
        closing(open_writer(settings)) as writer,
    ):
        store = StoreService(writer, Policy(settings))
        services = Services(finder, Archive(finder, open_readable(settings), transcoder), store)
        server = make_server(settings, change(services), ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        assert ready.wait(30)
        with httpx.Client(timeout=60) as client:
            yield Web(settings, port, client, finder)
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
