"""pynetdicom's events, answered by our services: parse, ask, answer."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

from pydicom.dataset import Dataset
from pynetdicom import evt
from pynetdicom.association import Association
from pynetdicom.dimse_primitives import C_ECHO, C_FIND, C_STORE
from pynetdicom.pdu_primitives import A_ASSOCIATE, A_P_ABORT

from sphere.conf.logs import hashed
from sphere.scp import contexts
from sphere.scp.find import FindRequest, FindService
from sphere.scp.peers import CallingPolicy
from sphere.scp.store import MISMATCH, SUCCESS, StoreAnswer, StoreRequest, StoreService
from sphere.scp.transport import ArrivingDataSet

log = logging.getLogger(__name__)

Event = Any  # pynetdicom's Event, whose attributes depend on what happened

UNRECOGNIZED = 0x0211  # unrecognized operation (PS3.7 C.5.18)
CLASS_NOT_SUPPORTED = 0x0122  # PS3.7 C.5.6
LOCAL_LIMIT_EXCEEDED = (0x02, 0x03, 0x02)  # transient, by the service provider (PS3.8 9.3.4)
CALLING_AE_NOT_RECOGNIZED = (0x01, 0x01, 0x03)  # permanent, by the service user (PS3.8 9.3.4)
MAX_QUEUED = 32  # responses waiting to be sent before the next match is asked for: what a slow reader costs


@dataclass(eq=False)
class Session:
    """What we know of one association; `id` stands in every line of the log about it."""

    id: str
    address: str
    calling: str = ""
    started: float = field(default_factory=time.monotonic)
    stored: int = 0
    warned: int = 0
    failed: int = 0
    found: int = 0
    extensions: dict[str, bytes] = field(default_factory=dict)  # granted to FIND classes

    def note(self, answer: StoreAnswer) -> None:
        """Count one C-STORE."""
        self.stored += answer.status in (SUCCESS, MISMATCH)
        self.warned += answer.status == MISMATCH
        self.failed += answer.status not in (SUCCESS, MISMATCH)


class Handlers:
    """One per receiver process."""

    def __init__(self, policy: CallingPolicy, store: StoreService, find: FindService, *, max_associations: int) -> None:
        self._policy = policy
        self._max_associations = max_associations
        self._store = store
        self._find = find
        self._numbers = count(1)
        self._sessions: WeakKeyDictionary[Association, Session] = WeakKeyDictionary()

    def bindings(self) -> list[Any]:
        """(event, handler) pairs for the server."""
        return [
            (evt.EVT_CONN_OPEN, self.on_open),
            (evt.EVT_CONN_CLOSE, self.on_close),
            (evt.EVT_REQUESTED, self.on_requested),
            (evt.EVT_SOP_EXTENDED, self.on_sop_extended),
            (evt.EVT_SOP_COMMON, self.on_sop_common),
            (evt.EVT_ACCEPTED, self.on_accepted),
            (evt.EVT_C_ECHO, self.on_echo),
            (evt.EVT_C_STORE, self.on_store),
            (evt.EVT_C_FIND, self.on_find),
        ]

    def on_open(self, event: Event) -> None:
        """A connection: give it an id."""
        self._sessions[event.assoc] = Session(f"{os.getpid()}-{next(self._numbers)}", str(event.address[0]))

    def on_close(self, event: Event) -> None:
        """The end of a connection: say what it did, and wake an association that still waits for its request."""
        session = self._sessions[event.assoc]
        if event.assoc.requestor.primitive is None:
            event.assoc.dul.to_user_queue.put(A_P_ABORT())
        event.assoc.dimse.abandon()
        log.info(
            "association closed id=%s calling=%s stored=%d warned=%d failed=%d found=%d aborted=%s s=%.3f",
            session.id, session.calling, session.stored, session.warned, session.failed, session.found,
            not event.assoc.is_released, time.monotonic() - session.started,
        )  # fmt: skip

    def on_requested(self, event: Event) -> None:
        """A-ASSOCIATE-RQ: refuse unknown callers, and support what the others propose."""
        assoc, request = event.assoc, event.assoc.requestor.primitive
        if not isinstance(request, A_ASSOCIATE):
            assoc.is_aborted = True  # the connection ended before it asked for anything: see on_close
            return
        session = self._sessions[assoc]
        session.calling = request.calling_ae_title.strip()
        if not self._policy.admits(session.calling, session.address):
            self._reject(event, CALLING_AE_NOT_RECOGNIZED)
        elif sum(other.is_established for other in assoc.ae.active_associations) >= self._max_associations:
            self._reject(event, LOCAL_LIMIT_EXCEEDED)
        else:
            narrowed = contexts.narrow(request.presentation_context_definition_list)
            request.presentation_context_definition_list = narrowed
            assoc.acceptor.supported_contexts = contexts.supported(narrowed)

    def _reject(self, event: Event, reason: tuple[int, int, int]) -> None:
        event.assoc.acse.send_reject(*reason)
        session, answer = self._sessions[event.assoc], event.assoc.acceptor.primitive
        log.warning(
            "association rejected id=%s calling=%s address=%s source=%s reason=%s",
            session.id, session.calling, session.address, answer.result_source, answer.diagnostic,
        )  # fmt: skip
        event.assoc.kill()  # returns when the rejection is out

    def on_sop_extended(self, event: Event) -> dict[str, bytes]:
        """SOP Class Extended Negotiation (PS3.7 D.3.3.5), for the FIND classes."""
        asked = {uid: info for uid, info in event.app_info.items() if uid in contexts.FIND_MODELS}
        granted = {uid: contexts.find_extensions(info) for uid, info in asked.items()}
        self._sessions[event.assoc].extensions = granted
        return granted

    def on_sop_common(self, event: Event) -> dict[str, Any]:
        """Tell pynetdicom which of the proposed classes are storage: it does not know private and retired ones."""
        items: dict[str, Any] = contexts.storage_classes(
            event.assoc.requestor.primitive.presentation_context_definition_list
        )
        return items

    def on_accepted(self, event: Event) -> None:
        """A-ASSOCIATE-AC was sent."""
        session, assoc = self._sessions[event.assoc], event.assoc
        log.info(
            "association accepted id=%s calling=%s called=%s address=%s contexts=%d refused=%d",
            session.id, session.calling, assoc.requestor.primitive.called_ae_title.strip(), session.address,
            len(assoc.accepted_contexts), len(assoc.rejected_contexts),
        )  # fmt: skip

    def on_echo(self, event: Event) -> int:
        """C-ECHO (PS3.7 9.1.5)."""
        return 0x0000 if isinstance(event.request, C_ECHO) else UNRECOGNIZED

    def on_store(self, event: Event) -> Dataset:
        """C-STORE (PS3.7 9.1.1)."""
        request = event.request
        if not isinstance(request, C_STORE):  # pynetdicom chooses the service by SOP class, not by message
            return _status(UNRECOGNIZED)
        if not contexts.is_storage(event.context.abstract_syntax):
            return _status(CLASS_NOT_SUPPORTED)
        session, started = self._sessions[event.assoc], time.monotonic()
        arrived = _store_request(request, session, str(event.context.transfer_syntax))
        answer = self._store.land(arrived)
        session.note(answer)
        log.debug(
            "store id=%s instance=%s bytes=%d status=0x%04X ms=%.1f",
            session.id, hashed(arrived.AffectedSOPInstanceUID), arrived.size, answer.status,
            1000 * (time.monotonic() - started),
        )  # fmt: skip
        event.request.DataSet.discard()
        return _status(answer.status, answer.comment)

    def on_find(self, event: Event) -> Iterator[tuple[Dataset | int, Dataset | None]]:
        """C-FIND (PS3.7 9.1.2)."""
        if not isinstance(event.request, C_FIND) or event.context.abstract_syntax not in contexts.FIND_MODELS:
            yield UNRECOGNIZED, None
            return
        session, started = self._sessions[event.assoc], time.monotonic()
        request, matches, final = _find_request(event, session), 0, SUCCESS
        try:
            for answer in self._find.answers(request, cancelled=lambda: bool(event.is_cancelled)):
                matches += answer.identifier is not None
                final = SUCCESS if answer.identifier is not None else answer.status
                yield _status(answer.status, answer.comment, answer.offending), answer.identifier
                _wait_for_room(event.assoc)
        finally:  # after a failure or a cancel nobody asks for more, and this generator is closed
            session.found += matches
            log.info(
                "find id=%s model=%s matches=%d status=0x%04X ms=%.1f",
                session.id, request.model, matches, final, 1000 * (time.monotonic() - started),
            )  # fmt: skip


def _store_request(request: Any, session: Session, transfer_syntax: str) -> StoreRequest:
    dataset: ArrivingDataSet = request.DataSet
    return StoreRequest(
        AffectedSOPClassUID=str(request.AffectedSOPClassUID),
        AffectedSOPInstanceUID=str(request.AffectedSOPInstanceUID),
        TransferSyntaxUID=transfer_syntax,
        dataset=dataset.content(),
        size=dataset.size,
        calling_ae=session.calling,
        address=session.address,
        problem=dataset.error,
    )


def _find_request(event: Event, session: Session) -> FindRequest:
    sop_class = event.context.abstract_syntax
    granted = session.extensions.get(sop_class, b"")
    return FindRequest(
        model=contexts.FIND_MODELS[sop_class],
        identifier=event.request.Identifier.getvalue(),
        transfer_syntax=event.context.transfer_syntax,
        relational=contexts.extension(granted, contexts.RELATIONAL),
        combined_datetime=contexts.extension(granted, contexts.COMBINED_DATETIME),
    )


def _status(code: int, comment: str = "", offending: tuple[int, ...] = ()) -> Dataset:
    """The status elements of a response (PS3.7 Annex C)."""
    status = Dataset()
    status.Status = code
    if comment:
        status.ErrorComment = comment.encode("ascii", "replace").decode().replace("\\", "/")
    if offending:
        status.OffendingElement = list(offending)
    return status


def _wait_for_room(assoc: Association) -> None:
    """Let the peer take what was said before more is looked up."""
    while assoc.dul.to_provider_queue.qsize() > MAX_QUEUED and assoc.dul.is_alive():
        time.sleep(0.001)
