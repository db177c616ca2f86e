"""What is recorded of DIMSE requests: each query and retrieval, and what an association stored when it ends."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Final

from sphere.catalog.audit import AuditJournal
from sphere.conf.peers import NOT_AUTHORIZED
from sphere.scp.callers import Caller
from sphere.scp.upper.association import Association, Response, Service
from sphere.scp.upper.command import C_FIND_RQ, C_GET_RQ, C_MOVE_RQ, C_STORE_RQ, N_ACTION_RQ
from sphere.scp.upper.messages import Message

NAMES: Final = {
    C_STORE_RQ: "C-STORE",
    C_FIND_RQ: "C-FIND",
    C_GET_RQ: "C-GET",
    C_MOVE_RQ: "C-MOVE",
    N_ACTION_RQ: "N-ACTION",
}
MAX_IDENTIFIER: Final = 64 << 10  # bytes of an identifier that is recorded whole (PS3.15 A.5.3.10)
BEGIN: Final = 8 << 10  # bytes that are recorded of a longer one
PENDING: Final = frozenset((0xFF00, 0xFF01))  # PS3.4 Table C.4-1
CANCELLED: Final = 0xFE00


class Records:
    """Writes the records of one receiver process."""

    def __init__(self, journal: AuditJournal) -> None:
        self._journal = journal

    def recorded(self, field: int, service: Service) -> Service:
        """The service, with a record of each request; of C-STORE, one for all of an association."""
        if field == C_STORE_RQ:
            return self._stores(service)

        def serve(message: Message, association: Association) -> Iterable[Response]:
            began, last, found = time.monotonic(), None, 0
            identifier = _identifier(message)
            try:
                for last in service(message, association):
                    found += last.status in PENDING
                    yield last
            finally:
                told = last.elements if last is not None else {}
                self._add(
                    association,
                    field,
                    path=f"{association.called}/{message.context.abstract_syntax}",
                    **identifier,
                    transfer_syntax=message.context.transfer_syntax,
                    status=last.status if last is not None else 0,
                    outcome=_outcome(last.status if last is not None else None),
                    entities=found if field == C_FIND_RQ else told.get("NumberOfCompletedSuboperations", 0),
                    failed=told.get("NumberOfFailedSuboperations", 0),
                    seconds=round(time.monotonic() - began, 3),
                )

        return serve

    def _stores(self, service: Service) -> Service:
        def serve(message: Message, association: Association) -> Iterable[Response]:
            caller = association.admission
            assert isinstance(caller, Caller)
            if caller.at_end is None:
                began, name = time.monotonic(), caller.name
                caller.at_end = lambda: self._stored(association, name, began)
            return service(message, association)

        return serve

    def _stored(self, association: Association, role: str, began: float) -> None:
        tally = association.tally
        refused = tally["unauthorized"] if not tally["stored"] + tally["failed"] else 0
        self._add(
            association,
            C_STORE_RQ,
            role=role,
            path=association.called,
            outcome="refused" if refused else "failed" if tally["failed"] else "done",
            entities=tally["stored"],
            failed=tally["failed"],
            seconds=round(time.monotonic() - began, 3),
        )

    def _add(self, association: Association, field: int, *, role: str = "", **more: object) -> None:
        if not role:
            caller = association.admission
            role = caller.name if isinstance(caller, Caller) else ""
        who = f"ae:{association.calling}"
        self._journal.add(
            who=who, role=role, address=association.address, method=NAMES.get(field, f"{field:04X}"), **more
        )


def _identifier(message: Message) -> dict[str, str]:
    """In hexadecimal, as it came; of one that is too long its begin, and how much of what was left out."""
    dataset = message.dataset
    if dataset is None:
        return {"identifier": ""}
    if dataset.size <= MAX_IDENTIFIER:
        return {"identifier": dataset.tobytes().hex()}
    begin = dataset.begin(BEGIN).hex()
    return {"query": f"{begin}... [cut: {dataset.size} bytes with SHA-256 {dataset.sha256}]"}


def _outcome(status: int | None) -> str:
    if status is None or status in PENDING:
        return "broken off"
    if status == NOT_AUTHORIZED:
        return "refused"
    return "done" if status in (0, CANCELLED) or status >> 12 == 0xB else "failed"
