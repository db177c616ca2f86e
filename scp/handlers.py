"""The DIMSE services of a receiver: parse, ask, answer."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from pydicom.uid import UID

from sphere.catalog.audit import AuditJournal
from sphere.conf.logs import hashed
from sphere.conf.peers import NOT_AUTHORIZED, Right
from sphere.scp import contexts
from sphere.scp.answers import AnswerEncoder
from sphere.scp.audit import Records
from sphere.scp.callers import Caller, Callers
from sphere.scp.decode import MAX_IDENTIFIER
from sphere.scp.find import UNABLE, FindAnswer, FindRequest, FindService, internal_error
from sphere.scp.store import MISMATCH, OUT_OF_RESOURCES, SUCCESS, StoreRequest, StoreService
from sphere.scp.upper.association import Association, Response, Service
from sphere.scp.upper.command import C_ECHO_RQ, C_FIND_RQ, C_GET_RQ, C_MOVE_RQ, C_STORE_RQ
from sphere.scp.upper.messages import Message
from sphere.scp.upper.negotiation import Proposal

log = logging.getLogger(__name__)

CLASS_NOT_SUPPORTED = 0x0122  # PS3.7 C.5.6
RIGHTS: Mapping[int, Right] = {C_STORE_RQ: "store", C_FIND_RQ: "find", C_MOVE_RQ: "retrieve", C_GET_RQ: "retrieve"}
CANNOT_UNDERSTAND = 0xC000  # PS3.4 Table B.2-1


class Handlers:
    """One per receiver process."""

    def __init__(
        self,
        callers: Callers,
        store: StoreService,
        find: FindService,
        more: Mapping[int, Service] | None = None,
        *,
        journal: AuditJournal | None = None,
    ) -> None:
        """`more` are services that live elsewhere; what is asked and stored is recorded in `journal`."""
        self._callers = callers
        self._store = store
        self._find = find
        self._more = more or {}
        self._records = Records(journal) if journal else None
        self._encoders = threading.local()

    def services(self) -> Mapping[int, Service]:
        """By the command field of the request."""
        services: dict[int, Service] = {C_STORE_RQ: self.on_store, C_FIND_RQ: self.on_find, **self._more}
        guarded = {field: _guarded(service, RIGHTS.get(field, "store")) for field, service in services.items()}
        if self._records:
            guarded = {field: self._records.recorded(field, service) for field, service in guarded.items()}
        return {C_ECHO_RQ: self.on_echo, **guarded}

    def admit(self, proposal: Proposal, address: str) -> Caller:
        """Who calls; raises Rejection for whom is not let in."""
        return self._callers.admit(proposal, address)

    def on_echo(self, message: Message, association: Association) -> Iterator[Response]:
        """C-ECHO (PS3.7 9.1.5)."""
        association.tally["echoes"] += 1
        yield Response(SUCCESS if message.context.abstract_syntax == contexts.VERIFICATION else CLASS_NOT_SUPPORTED)

    def begun(self) -> Mapping[int, Callable[[Message, Association], object]]:
        """As of Acceptor."""
        return {C_STORE_RQ: self.begin_store}

    def begin_store(self, message: Message, association: Association) -> StoreRequest | Response:
        """What a C-STORE-RQ asks for, as far as its command says it; the answer, where it cannot be done."""
        sop_class = message.command.get("AffectedSOPClassUID", "")
        if not (contexts.is_storage(message.context.abstract_syntax) and contexts.is_storage(sop_class)):
            return Response(CLASS_NOT_SUPPORTED)
        if message.dataset is None or "AffectedSOPInstanceUID" not in message.command:
            return Response(CANNOT_UNDERSTAND, _told("a data set and its instance UID are needed"))
        request = StoreRequest(
            AffectedSOPClassUID=sop_class,
            AffectedSOPInstanceUID=message.command["AffectedSOPInstanceUID"],
            TransferSyntaxUID=message.context.transfer_syntax,
            dataset=b"",
            size=0,
            calling_ae=association.calling,
            called_ae=association.called,
            sender=association.id,
            address=association.address,
            abstract_syntax=message.context.abstract_syntax,
        )
        return self._store.begin(request)

    def on_store(self, message: Message, association: Association) -> Iterable[Response]:
        """C-STORE (PS3.7 9.1.1)."""
        request = message.ready or self.begin_store(message, association)
        if not isinstance(request, StoreRequest):
            assert isinstance(request, Response)
            return (request,)
        assert message.dataset is not None
        started, size = time.monotonic(), message.dataset.size
        request.dataset, request.size = message.dataset.content(), size
        request.problem, request.digested = message.dataset.error, message.dataset.digest_beside()
        if request.digested is None:
            request.sha256 = message.dataset.sha256
        answer = self._store.land(request)
        kept = answer.status in (SUCCESS, MISMATCH)
        association.tally["stored"] += kept
        association.tally["warned"] += answer.status == MISMATCH
        association.tally["failed"] += not kept
        if log.isEnabledFor(logging.DEBUG):
            log.debug(
                "store id=%s instance=%s bytes=%d status=0x%04X ms=%.1f",
                association.id, hashed(message.command["AffectedSOPInstanceUID"]), size, answer.status,
                1000 * (time.monotonic() - started),
            )  # fmt: skip
        if delay := _caller(association).delay(size):
            log.debug("store delayed id=%s s=%.3f", association.id, delay)
            association.pause(delay)
        return (Response(answer.status, _told(answer.comment)),)

    def on_find(self, message: Message, association: Association) -> Iterator[Response]:
        """C-FIND (PS3.7 9.1.2)."""
        if message.context.abstract_syntax not in contexts.FIND_MODELS:
            yield Response(CLASS_NOT_SUPPORTED)
            return
        if message.dataset is None or message.dataset.size > MAX_IDENTIFIER:
            yield Response(UNABLE, _told("an identifier is needed, of at most 4 MiB"))
            return
        with _caller(association).query() as placed:
            if placed:
                yield from self._answers(message, association)
            else:
                yield Response(OUT_OF_RESOURCES, _told("too many queries at once"))

    def _answers(self, message: Message, association: Association) -> Iterator[Response]:
        started, matches, final = time.monotonic(), 0, SUCCESS
        request = _find_request(message, association)
        encoder = self._encoder(request.transfer_syntax)
        try:
            for answer in self._find.answers(request, cancelled=lambda: association.cancelled(message)):
                answer, identifier = _encoded(answer, encoder)
                matches += answer.match is not None
                final = SUCCESS if answer.match is not None else answer.status
                yield Response(answer.status, _told(answer.comment, answer.offending), identifier, answer.more)
                if final != SUCCESS:
                    break
            if final == SUCCESS:
                yield Response(SUCCESS)
        finally:  # this generator is closed where there is nobody any more to answer
            association.tally["found"] += matches
            log.info(
                "find id=%s model=%s matches=%d status=0x%04X ms=%.1f",
                association.id, request.model, matches, final, 1000 * (time.monotonic() - started),
            )  # fmt: skip

    def _encoder(self, syntax: UID) -> AnswerEncoder:
        """That of this thread, which serves one association."""
        encoders: dict[str, AnswerEncoder] = self._encoders.__dict__
        if syntax not in encoders:
            encoders[syntax] = AnswerEncoder(syntax)
        return encoders[syntax]


def _caller(association: Association) -> Caller:
    caller = association.admission
    assert isinstance(caller, Caller)
    return caller


def _guarded(service: Service, right: Right) -> Service:
    """The service for who has the right, and for others a refusal that says so (PS3.7 C.5.24)."""

    def serve(message: Message, association: Association) -> Iterable[Response]:
        caller = _caller(association)
        if right in caller.rights.may:
            return service(message, association)
        association.tally["unauthorized"] += 1
        log.warning("%s id=%s refused: %s may not", right, association.id, caller.name)
        return (Response(NOT_AUTHORIZED, _told(f"not authorized to {right}")),)

    return serve


def _find_request(message: Message, association: Association) -> FindRequest:
    assert message.dataset is not None
    sop_class = message.context.abstract_syntax
    return FindRequest(
        model=contexts.FIND_MODELS[sop_class],
        identifier=message.dataset.tobytes(),
        transfer_syntax=message.context.transfer_syntax,
        features=contexts.find_features(association.extension(sop_class)),
        called_ae=association.called,
    )


def _encoded(answer: FindAnswer, encoder: AnswerEncoder) -> tuple[FindAnswer, bytes]:
    """An answer and its identifier; where that cannot be encoded, the failure that is answered instead."""
    if answer.match is None:
        return answer, b""
    try:
        return answer, encoder.encode(answer.match)
    except Exception as error:  # noqa: BLE001  one entity's values must not end the association
        return internal_error(error), b""


def _told(comment: str, offending: tuple[int, ...] = ()) -> dict[str, Any]:
    """The status elements of a response (PS3.7 Annex C)."""
    elements: dict[str, Any] = {}
    if comment:
        elements["ErrorComment"] = comment.encode("ascii", "replace").decode().replace("\\", "/")
    if offending:
        elements["OffendingElement"] = list(offending)
    return elements
