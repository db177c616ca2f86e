"""Associations that we ask for: opened and ended here, and failures said in words."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pydicom.dataset import Dataset
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.pdu_primitives import A_ASSOCIATE, SOPClassExtendedNegotiation
from pynetdicom.presentation import PresentationContext

from sphere.conf.errors import PeerError
from sphere.conf.settings import Peer, Settings
from sphere.ingest.part10 import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from sphere.scp.libraries import prepare_libraries

MAX_CONTEXTS = 128  # presentation contexts of one association: odd ids from 1 to 255 (PS3.8 9.3.2.2)


def describe(peer: Peer) -> str:
    """How messages call a peer."""
    return f"peer {peer.ae_title} at {peer.host}:{peer.port}"


@contextmanager
def association(
    peer: Peer,
    settings: Settings,
    contexts: Sequence[PresentationContext],
    *,
    extensions: dict[str, bytes] | None = None,
) -> Iterator[Association]:
    """An established association, released at the end, aborted when it is left by an exception.

    `extensions` is Service Class Application Information by SOP class (PS3.7 D.3.3.5). Raises PeerError.
    """
    assoc = open_association(peer, settings, contexts, extensions=extensions)
    try:
        yield assoc
    except BaseException:
        assoc.abort()
        raise
    assoc.release()


def open_association(
    peer: Peer,
    settings: Settings,
    contexts: Sequence[PresentationContext],
    *,
    extensions: dict[str, bytes] | None = None,
) -> Association:
    """An established association, the caller's to release; raises PeerError that says what to check."""
    prepare_libraries()
    ae = AE(ae_title=settings.archive.ae_title)
    ae.implementation_class_uid = IMPLEMENTATION_CLASS_UID
    ae.implementation_version_name = IMPLEMENTATION_VERSION_NAME
    ae.connection_timeout = ae.acse_timeout = settings.dimse.artim_s or None
    ae.dimse_timeout = settings.dimse.dimse_timeout_s or None
    ae.network_timeout = settings.dimse.network_timeout_s or None
    assoc = ae.associate(
        _address(peer),
        peer.port,
        contexts=list(contexts),
        ae_title=peer.ae_title,
        max_pdu=settings.dimse.max_pdu,
        ext_neg=[_extension(uid, info) for uid, info in (extensions or {}).items()],
        evt_handlers=[(evt.EVT_CONN_OPEN, _send_at_once)],
    )
    if not assoc.is_established:
        raise PeerError(_why_not(assoc, peer, settings))
    hold_reactor(assoc)
    return assoc


class _Hold(threading.Event):
    """A checkpoint that says when the thread it is for has reached it."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.reached.set()
        return super().wait(timeout)


def hold_reactor(assoc: Association) -> None:
    """Stop the thread that looks for messages on its own, until release or abort.

    pynetdicom pauses it before each request, but trusts a flag that is up before the thread has stopped: now and then
    it goes on, takes the response, and the request waits until its timeout.
    """
    hold = _Hold()
    assoc._reactor_checkpoint = hold
    while assoc.is_alive() and not hold.reached.wait(0.01):
        pass


def failure(status: Dataset) -> str:
    """A response's status in words, with the peer's comment where it sent one."""
    comment = str(status.get("ErrorComment", "") or "")
    return f"status 0x{status.Status:04X}" + (f" ({comment})" if comment else "")


def no_answer(assoc: Association, peer: Peer, settings: Settings) -> str:
    """Why a response did not come."""
    if assoc.acse.is_aborted("a-abort") or assoc.is_aborted:
        return f"{describe(peer)} aborted the association"
    return (
        f"{describe(peer)} did not answer: it closed the connection, or took longer than "
        f"dimse.dimse_timeout_s = {settings.dimse.dimse_timeout_s:g} s"
    )


def _address(peer: Peer) -> str:
    """An IP address of the peer, IPv4 where it has both; raises PeerError."""
    try:
        found = socket.getaddrinfo(peer.host, peer.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise PeerError(f"{describe(peer)}: host name cannot be resolved ({error.strerror}); check `host`") from None
    found.sort(key=lambda item: item[0] != socket.AF_INET)
    return str(found[0][4][0])


def _extension(uid: str, info: bytes) -> SOPClassExtendedNegotiation:
    item = SOPClassExtendedNegotiation()
    item.sop_class_uid = uid
    item.service_class_application_information = info
    return item


def _send_at_once(event: Any) -> None:
    """TCP_NODELAY: command and data set are separate writes, which Nagle's algorithm would hold back."""
    event.assoc.dul.socket.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _why_not(assoc: Association, peer: Peer, settings: Settings) -> str:
    """Why there is no association, and what to check."""
    answer = assoc.acceptor.primitive or assoc.dul.peek_next_pdu()  # not taken up yet where it came with the end
    if isinstance(answer, A_ASSOCIATE) and answer.result:
        return (
            f"{describe(peer)} rejected the association: {answer.reason_str}; check that it knows us as "
            f"{settings.archive.ae_title!r} and is called {peer.ae_title!r}"
        )
    if isinstance(answer, A_ASSOCIATE):
        return f"{describe(peer)} accepts none of the services asked for"
    try:
        with socket.create_connection((peer.host, peer.port), timeout=settings.dimse.artim_s or None):
            pass
    except OSError as error:
        reason = error.strerror or type(error).__name__
        return f"{describe(peer)}: cannot connect ({reason}); check host and port, and that it runs"
    return f"{describe(peer)} takes connections and does not answer an association request; check that it is DICOM"
