"""One receiver process: the DIMSE port, its services, and a clean end."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from contextlib import closing

from sphere.catalog.audit import AuditJournal
from sphere.catalog.known import KnownInstances
from sphere.catalog.lookup_process import LookupProcess
from sphere.catalog.queries import LateQueries
from sphere.conf.errors import SphereError
from sphere.conf.footprint import give_back
from sphere.conf.settings import Settings
from sphere.ingest.spool import open_readable, open_writer, recover_all
from sphere.ingest.storage import open_storage
from sphere.scp.callers import Callers
from sphere.scp.commitment.service import Commitment
from sphere.scp.find import FindService
from sphere.scp.handlers import Handlers
from sphere.scp.libraries import prepare_libraries
from sphere.scp.peers import CallingPolicy
from sphere.scp.policy import Policy
from sphere.scp.refusing import ToldWriter
from sphere.scp.retrieve.handlers import RetrieveHandlers
from sphere.scp.retrieve.locate import Locator
from sphere.scp.retrieve.service import RetrieveService
from sphere.scp.retrieve.transcoder import Transcoder
from sphere.scp.store import StoreService
from sphere.scp.upper.association import Acceptor
from sphere.scp.upper.server import Server

log = logging.getLogger(__name__)

GIVE_BACK_S = 10.0  # seconds after which what was freed goes back to the system
DRAIN_S = 20.0  # seconds that running associations have after SIGTERM


def run_receiver(
    settings: Settings, *, ready: Callable[[int], None], refuses: Callable[[bool], None] = lambda _: None
) -> None:
    """Receive on settings.dimse until SIGTERM or SIGINT; `ready` is called with the port when it listens, `refuses`
    when the storage begins to take nothing, and when it takes something again.

    Then: no new associations, the running ones finish within DRAIN_S seconds or are aborted, the bundle is sealed.
    Raises SettingsError when the port cannot be had, StorageError when the storage cannot.
    """
    stop = _stop_signal()
    prepare_libraries()
    threading.excepthook = _log_thread_error
    writer = open_writer(settings)
    threading.Thread(target=_recover, args=(settings,), daemon=True, name="recovery").start()
    try:
        with (
            LateQueries(settings) as finder,
            closing(LookupProcess(settings, finder)) as lookup,
            closing(Transcoder()) as transcoder,
            closing(_journal(settings)) as journal,
        ):
            locator = Locator(finder, settings.snapshots)
            readable = open_readable(settings)
            retrieve = RetrieveHandlers(RetrieveService(settings, readable, locator, transcoder)).services()
            calling = CallingPolicy(settings.peers)
            known, on_conflict = KnownInstances(settings, finder), settings.ingest.on_conflict
            store = StoreService(ToldWriter(writer, refuses), Policy(settings, calling), known, on_conflict=on_conflict)
            find = FindService(finder, settings.snapshots)
            commitment = Commitment(settings, lookup, readable)
            callers = Callers(settings, calling)
            handlers = Handlers(callers, store, find, {**retrieve, **commitment.handlers.services()}, journal=journal)
            with commitment:
                _serve(listen(settings, handlers), stop, ready)
    finally:
        writer.close()
    log.info("receiver stopped")


def _serve(server: Server, stop: threading.Event, ready: Callable[[int], None]) -> None:
    accepting = threading.Thread(target=server.serve, daemon=True, name="accept")
    accepting.start()
    log.info("receiver listens port=%d", server.port)
    ready(server.port)
    tidied = time.monotonic()
    while not stop.wait(1.0):
        if time.monotonic() - tidied > GIVE_BACK_S:
            give_back()
            tidied = time.monotonic()
        if not accepting.is_alive():
            raise SphereError("nothing accepts connections any more; this receiver has to be started again")
    server.stop()
    server.drain(DRAIN_S)


def _journal(settings: Settings) -> AuditJournal:
    storage = open_storage(settings.storage.root, user=settings.storage.user)
    return AuditJournal(storage, settings.archive.state_dir / "audit.jsonl")


def _recover(settings: Settings) -> None:
    """Settle the bundles of dead receivers while this one serves; killed anywhere, the next one goes on."""
    try:
        report = recover_all(settings)
    except SphereError as error:  # the storage is away: the next start or extraction does it
        log.warning("bundles of dead writers are left for later: %s", error)
        return
    if report.bundles:
        log.info("recovered bundles=%d failed=%d", len(report.bundles), len(report.failed))


def _log_thread_error(args: threading.ExceptHookArgs) -> None:
    name = args.thread.name if args.thread else ""
    log.error("thread %s ended by %s", name, args.exc_type.__name__)


def _stop_signal() -> threading.Event:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # the supervisor decides about Ctrl-C
        signal.signal(signal.SIGINT, lambda *_: stop.set())
    return stop


def listen(settings: Settings, handlers: Handlers) -> Server:
    """A server that is bound and not yet serving; raises SettingsError when the port cannot be had."""
    dimse = settings.dimse
    acceptor = Acceptor(
        services=handlers.services(),
        begun=handlers.begun(),
        admit=handlers.admit,
        places=threading.BoundedSemaphore(dimse.max_associations),
        max_pdu=dimse.max_pdu,
        artim_s=dimse.artim_s,
    )
    return Server(settings, acceptor)
