"""The HTTP process: one uvicorn server on the query service, and a clean end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from typing import cast

import uvicorn

from sphere.catalog.annotations import Annotations
from sphere.catalog.audit import AuditJournal
from sphere.catalog.cohorts import Cohorts
from sphere.catalog.known import KnownInstances
from sphere.catalog.overview import Overview
from sphere.catalog.queries import open_queries
from sphere.catalog.tombstones import open_tombstones
from sphere.conf.errors import SettingsError
from sphere.conf.settings import Settings
from sphere.ingest.spool import open_readable, open_writer
from sphere.ingest.storage import open_storage
from sphere.scp.libraries import prepare_libraries
from sphere.scp.policy import Policy
from sphere.scp.retrieve.transcoder import Transcoder
from sphere.scp.store import StoreService
from sphere.scp.upper.tls import web_context
from sphere.scp.web.app import Services, make_app
from sphere.scp.web.archive import Archive
from sphere.scp.web.known import KnownSeries
from sphere.scp.web.local import LOCAL_NAMES
from sphere.scp.web.protocol import BoundedHttp, Crowd
from sphere.scp.web.proxies import Trusted
from sphere.scp.web.tokens import Tokens

log = logging.getLogger(__name__)

DRAIN_S = 20  # seconds that running requests have after SIGTERM
KEEP_ALIVE_S = 15  # seconds that an idle connection is kept
MAX_REQUESTS = 256  # connections, and requests under way, above which 503 is answered
MAX_OF_ONE = 128  # connections of one address above which 503 is answered
BACKLOG = 256


class _Server(uvicorn.Server):
    """Tells when it listens; signals are ours."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        def stop(*_: object) -> None:
            self.should_exit = True

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signal.signal(signal.SIGTERM, stop)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # the supervisor decides about Ctrl-C
            signal.signal(signal.SIGINT, stop)
        yield


def run_web(settings: Settings, *, ready: Callable[[int], None]) -> None:
    """Serve HTTP on settings.web until SIGTERM or SIGINT; `ready` is called with the port when it listens.

    Then: no new connections, running requests finish within DRAIN_S seconds. Raises SettingsError when the port cannot
    be had, StorageError when the storage cannot.
    """
    prepare_libraries()
    listener = listen(settings)
    port = int(listener.getsockname()[1])
    with services_of(settings) as services:
        log.info("HTTP listens port=%d", port)
        make_server(settings, services, lambda: ready(port)).run(sockets=[listener])
    log.info("HTTP stopped")


@contextmanager
def services_of(settings: Settings) -> Iterator[Services]:
    """What the routes ask, closed at the end; raises StorageError where the storage cannot be had."""
    storage = open_storage(settings.storage.root, user=settings.storage.user)
    with (
        closing(open_queries(settings, apart=True)) as finder,
        closing(Transcoder()) as transcoder,
        closing(open_writer(settings)) as writer,
        closing(AuditJournal(storage, settings.archive.state_dir / "audit.jsonl")) as journal,
        closing(Annotations(settings)) as annotations,
        closing(Overview(settings)) as overview,
        closing(open_tombstones(settings)) as tombstones,
    ):
        archive = Archive(finder, open_readable(settings), transcoder, KnownSeries(finder))
        known, on_conflict = KnownInstances(settings, finder), settings.ingest.on_conflict
        store = StoreService(writer, Policy(settings), known, on_conflict=on_conflict)
        tokens, cohorts = Tokens(storage), Cohorts(storage)
        yield Services(finder, archive, store, tokens, cohorts, journal, annotations, overview, tombstones)


def make_server(settings: Settings, services: Services, ready: Callable[[], None]) -> uvicorn.Server:
    """A server that `run` has serve; `ready` is called when it does. Raises SettingsError for files of TLS."""
    tls = web_context(settings.web)
    if tls is None and settings.web.host not in LOCAL_NAMES:
        log.warning("HTTP without TLS beyond this host: tokens and images can be read on the way (web.tls_certificate)")
    writers = ThreadPoolExecutor(MAX_REQUESTS, "body")
    crowd = Crowd(MAX_REQUESTS, MAX_OF_ONE, Trusted(settings.web.trusted_proxies))
    config = uvicorn.Config(
        make_app(settings, services),
        http=cast("type[asyncio.Protocol]", partial(BoundedHttp, writers=writers, crowd=crowd)),
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_notify=max(1, round(settings.web.idle_s)),
        timeout_graceful_shutdown=DRAIN_S,
        ssl_context_factory=(lambda *_: tls) if tls else None,
    )
    return _Server(config, ready)


def listen(settings: Settings) -> socket.socket:
    """The listening socket; raises SettingsError when the port cannot be had."""
    host, port = settings.web.host, settings.web.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # without the protocol's number asyncio does not set TCP_NODELAY, and every response waits 40 ms for an ACK
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise SettingsError(f"web.port: cannot listen on {host}:{port}: {error.strerror}") from None
    return listener
