"""C-MOVE and C-GET of a receiver: parse, ask, answer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydicom.dataset import Dataset
from pydicom.uid import UID
from pynetdicom.dsutils import encode

from sphere.scp import contexts
from sphere.scp.contexts import RetrieveModel
from sphere.scp.decode import MAX_IDENTIFIER
from sphere.scp.retrieve.outbound import Counts
from sphere.scp.retrieve.service import (
    CANCELLED,
    PENDING,
    SUCCESS,
    UNABLE,
    RetrieveAnswer,
    RetrieveRequest,
    RetrieveService,
)
from sphere.scp.upper.association import Association, Response, Service
from sphere.scp.upper.command import C_GET_RQ, C_MOVE_RQ
from sphere.scp.upper.messages import Message

log = logging.getLogger(__name__)

CLASS_NOT_SUPPORTED = 0x0122  # PS3.7 C.5.6
MAX_COUNT = 0xFFFF  # US
Cancelled = Callable[[], bool]


class RetrieveHandlers:
    """One per receiver process."""

    def __init__(self, service: RetrieveService) -> None:
        self._service = service

    def services(self) -> Mapping[int, Service]:
        """By the command field of the request."""
        return {C_MOVE_RQ: self.on_move, C_GET_RQ: self.on_get}

    def on_move(self, message: Message, association: Association) -> Iterator[Response]:
        """C-MOVE (PS3.7 9.1.4)."""

        def answers(request: RetrieveRequest, cancelled: Cancelled) -> Iterator[RetrieveAnswer]:
            return self._service.move(request, cancelled=cancelled)

        yield from _responses(message, association, contexts.MOVE_MODELS, answers)

    def on_get(self, message: Message, association: Association) -> Iterator[Response]:
        """C-GET (PS3.7 9.1.3)."""

        def answers(request: RetrieveRequest, cancelled: Cancelled) -> Iterator[RetrieveAnswer]:
            return self._service.get(request, association, cancelled=cancelled)

        yield from _responses(message, association, contexts.GET_MODELS, answers)


def _responses(
    message: Message,
    association: Association,
    models: Mapping[str, RetrieveModel],
    ask: Callable[[RetrieveRequest, Cancelled], Iterator[RetrieveAnswer]],
) -> Iterator[Response]:
    if message.context.abstract_syntax not in models:
        yield Response(CLASS_NOT_SUPPORTED)
        return
    if message.dataset is None or message.dataset.size > MAX_IDENTIFIER:
        yield _response(RetrieveAnswer(UNABLE, comment="an identifier is needed, of at most 4 MiB"), UID(""))
        return
    started = time.monotonic()
    request = _request(message, association, models)
    answer = RetrieveAnswer(UNABLE)
    for answer in ask(request, lambda: association.cancelled(message)):
        yield _response(answer, request.transfer_syntax)
    counts = answer.counts or Counts(0)
    association.tally["sent"] += counts.completed + counts.warning
    association.tally["unsent"] += counts.failed
    log.info(
        "retrieve id=%s model=%s destination=%s completed=%d warning=%d failed=%d remaining=%d status=0x%04X s=%.3f",
        association.id, request.model, request.destination or "-", counts.completed, counts.warning, counts.failed,
        counts.remaining, answer.status, time.monotonic() - started,
    )  # fmt: skip


def _request(message: Message, association: Association, models: Mapping[str, RetrieveModel]) -> RetrieveRequest:
    assert message.dataset is not None
    sop_class = message.context.abstract_syntax
    return RetrieveRequest(
        model=models[sop_class],
        identifier=message.dataset.tobytes(),
        transfer_syntax=message.context.transfer_syntax,
        relational=contexts.extension(association.extension(sop_class), contexts.RELATIONAL),
        destination=message.command.get("MoveDestination", ""),
        message_id=message.command["MessageID"],
        calling_ae=association.calling,
        called_ae=association.called,
    )


def _response(answer: RetrieveAnswer, syntax: UID) -> Response:
    """The counts, and in a final response the Failed SOP Instance UID List (PS3.4 C.4.2.1.4.2, C.4.2.1.6)."""
    elements: dict[str, Any] = {}
    if answer.comment:
        elements["ErrorComment"] = answer.comment.encode("ascii", "replace").decode().replace("\\", "/")
    if answer.offending:
        elements["OffendingElement"] = list(answer.offending)
    counts = answer.counts
    if counts is None:
        return Response(answer.status, elements)
    elements["NumberOfCompletedSuboperations"] = min(counts.completed, MAX_COUNT)
    elements["NumberOfFailedSuboperations"] = min(counts.failed, MAX_COUNT)
    elements["NumberOfWarningSuboperations"] = min(counts.warning, MAX_COUNT)
    if answer.status in (PENDING, CANCELLED):
        elements["NumberOfRemainingSuboperations"] = min(counts.remaining, MAX_COUNT)
    if answer.status in (PENDING, SUCCESS) or not counts.failed_uids:
        return Response(answer.status, elements)
    return Response(answer.status, elements, _failed_list(counts.failed_uids, syntax))


def _failed_list(uids: list[str], syntax: UID) -> bytes:
    identifier = Dataset()
    identifier.FailedSOPInstanceUIDList = uids
    encoded: bytes | None = encode(identifier, syntax.is_implicit_VR, syntax.is_little_endian, syntax.is_deflated)
    return encoded or b""
