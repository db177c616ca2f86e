"""One receiver process: the DIMSE port, its services, and a clean end."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable

from pynetdicom import AE
from pynetdicom.presentation import build_context

from sphere.catalog.service import QueryService
from sphere.conf.errors import SettingsError
from sphere.conf.settings import Settings
from sphere.ingest.bundle import BundleWriter
from sphere.ingest.part10 import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from sphere.ingest.storage import open_storage
from sphere.scp.contexts import VERIFICATION
from sphere.scp.find import FindService
from sphere.scp.handlers import Handlers
from sphere.scp.libraries import prepare_libraries
from sphere.scp.peers import CallingPolicy
from sphere.scp.store import StoreService
from sphere.scp.transport import ReceiverServer

log = logging.getLogger(__name__)

DRAIN_S = 20.0  # seconds that running associations have after SIGTERM


def run_receiver(settings: Settings, *, ready: Callable[[int], None]) -> None:
    """Receive on settings.dimse until SIGTERM or SIGINT; `ready` is called with the port when it listens.

    Then: no new associations, the running ones finish within DRAIN_S seconds or are aborted, the bundle is sealed.
    Raises SettingsError when the port cannot be had, StorageError when the storage cannot.
    """
    stop = _stop_signal()
    prepare_libraries()
    threading.excepthook = _log_thread_error
    storage = open_storage(settings.storage.root, user=settings.storage.user)
    writer = BundleWriter(storage, settings)
    try:
        with QueryService(settings) as finder:
            handlers = Handlers(
                CallingPolicy(settings.peers),
                StoreService(writer),
                FindService(finder),
                max_associations=settings.dimse.max_associations,
            )
            _serve(listen(settings, handlers), stop, ready)
    finally:
        writer.close()
    log.info("receiver stopped")


def _serve(server: ReceiverServer, stop: threading.Event, ready: Callable[[int], None]) -> None:
    threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True, name="accept").start()
    log.info("receiver listens address=%s:%d", *server.server_address[:2])
    ready(server.port)
    stop.wait()
    server.stop_accepting()
    _drain(server)


def _log_thread_error(args: threading.ExceptHookArgs) -> None:
    name = args.thread.name if args.thread else ""
    log.error("thread %s ended by %s", name, args.exc_type.__name__)


def _stop_signal() -> threading.Event:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # the supervisor decides about Ctrl-C
        signal.signal(signal.SIGINT, lambda *_: stop.set())
    return stop


def listen(settings: Settings, handlers: Handlers) -> ReceiverServer:
    """A server that is bound and not yet serving; raises SettingsError when the port cannot be had."""
    ae = AE(ae_title=settings.archive.ae_title)
    ae.implementation_class_uid = IMPLEMENTATION_CLASS_UID
    ae.implementation_version_name = IMPLEMENTATION_VERSION_NAME
    ae.maximum_associations = sys.maxsize  # Handlers.on_requested counts those that are established
    ae.maximum_pdu_size = settings.dimse.max_pdu
    ae.acse_timeout = settings.dimse.artim_s or None
    ae.dimse_timeout = settings.dimse.dimse_timeout_s or None
    ae.network_timeout = settings.dimse.network_timeout_s or None
    try:  # the contexts of an association are set when it asks: see Handlers.on_requested
        return ReceiverServer(ae, settings, [build_context(VERIFICATION)], handlers.bindings())
    except OSError as error:
        where = f"{settings.dimse.host}:{settings.dimse.port}"
        raise SettingsError(f"dimse: cannot listen on {where}: {error.strerror}; choose another host or port") from None


def _drain(server: ReceiverServer) -> None:
    """Wait for the running associations, then abort those that are left."""
    deadline = time.monotonic() + DRAIN_S
    while server.active_associations and time.monotonic() < deadline:
        time.sleep(0.05)
    for association in server.active_associations:
        association.abort()
