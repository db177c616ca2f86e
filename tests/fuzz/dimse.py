"""Fuzz targets of what a peer may send: PDUs, DIMSE command sets, identifiers of queries and retrievals."""

from __future__ import annotations

import socket
import struct
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path

from pydicom.uid import UID

from sphere.catalog.query import Features, Query
from sphere.conf.errors import QueryError
from sphere.scp.decode import decode_identifier
from sphere.scp.find import FindAnswer, FindRequest, FindService
from sphere.scp.retrieve.identifier import parse_selection
from sphere.scp.upper import command, protocol
from sphere.scp.upper.connection import Connection
from sphere.scp.upper.dataset import Budget
from sphere.scp.upper.messages import Context, Inbox, Limits, Message
from sphere.scp.upper.negotiation import agree, read_request
from sphere.scp.upper.protocol import Ended, Rejection, Released, Violation
from sphere.scp.upper.transport import Plain
from tests.fuzz.seeds import SYNTAXES
from tests.support.raw_peer import CT, VERIFICATION

MAX_PDU = 4096
BUDGET = 1 << 22
CONTEXTS = {
    1: Context(1, UID(VERIFICATION), UID("1.2.840.10008.1.2")),
    3: Context(3, UID(CT), UID("1.2.840.10008.1.2.1")),
}
LIMITS = Limits(memory=1 << 10, folder=Path(tempfile.gettempdir()), idle_s=5.0, message_s=5.0)
REASONS = {
    protocol.UNSPECIFIED,
    protocol.UNRECOGNIZED_PDU,
    protocol.UNEXPECTED_PDU,
    protocol.UNEXPECTED_PARAMETER,
    protocol.INVALID_PARAMETER,
}


def pdus(data: bytes) -> None:
    """What comes over a new connection (first byte even), or on an association: one end or another, nothing else.

    When it is over nothing is kept: no view of a buffer, no byte of the budget. No message holds more than was sent.
    """
    budget = Budget(BUDGET)
    ours, theirs = socket.socketpair()
    connection = Connection(Plain(_Local(ours)), budget=budget, max_pdu=MAX_PDU)
    try:
        theirs.sendall(data[1:])
        theirs.shutdown(socket.SHUT_WR)
        contexts: Mapping[int, Context] = CONTEXTS
        if data[:1] and not data[0] % 2:
            contexts = _established(connection)
        total = _messages(Inbox(connection, contexts, LIMITS), connection)
        assert total <= len(data)
    except Violation as violation:
        assert violation.reason in REASONS and str(violation)
    except (Ended, Released, Rejection):
        pass
    finally:
        connection.close()
        theirs.close()
    assert connection.keep == 0 and budget.free == BUDGET


class _Local(socket.socket):
    """One of a pair of local sockets, which know nothing of TCP's options."""

    def __init__(self, inner: socket.socket) -> None:
        super().__init__(inner.family, inner.type, inner.proto, fileno=inner.detach())

    def setsockopt(self, level: int, name: int, *value: object) -> None:  # type: ignore[override]
        if level != socket.IPPROTO_TCP:
            super().setsockopt(level, name, *value)  # type: ignore[arg-type]


def _established(connection: Connection) -> Mapping[int, Context]:
    received = connection.pdu(first_s=5.0, rest_s=5.0)
    assert received is not None
    kind, body = received
    if kind != protocol.ASSOCIATE_RQ:
        raise Ended("not an association")
    agreement = agree(read_request(body), max_pdu=MAX_PDU)
    assert len(agreement.contexts) <= 128 and agreement.max_pdu < 1 << 32
    kind, length = protocol.PDU_HEADER.unpack_from(agreement.answer)
    assert (kind, length) == (2, len(agreement.answer) - protocol.PDU_HEADER.size)
    return agreement.contexts


def _messages(inbox: Inbox, connection: Connection) -> int:
    """Bytes of all messages until the connection ends; every message is held until the next one is there."""
    total, held = 0, None
    try:
        while True:
            message = inbox.next()
            if held is not None:
                inbox.finish(held)
            held = message
            total += _size(message)
    except Ended as end:
        if str(end) != "closed by the peer":
            raise
        return total
    finally:
        if held is not None:
            inbox.finish(held)
        inbox.close()
        assert connection.keep == 0


def _size(message: Message | None) -> int:
    assert message is not None
    command.encode({**message.command, "CommandGroupLength": None})
    if message.dataset is None:
        return 0
    assert len(message.dataset.tobytes()) == message.dataset.size
    return message.dataset.size


def commands(data: bytes) -> None:
    """A command set is read or refused; what was read, written and read again, is the same."""
    try:
        first = command.decode(data)
    except command.CommandError:
        return
    first.pop("CommandGroupLength", None)
    second = command.decode(command.encode(first))
    second.pop("CommandGroupLength")
    if data.isascii():
        assert second == first, (first, second)
    again = command.decode(command.encode(second))
    again.pop("CommandGroupLength")
    assert again == second, (second, again)
    if "MessageID" in first:
        response = command.decode(command.encode(command.response_to(first, 0)))
        assert response["MessageIDBeingRespondedTo"] == first["MessageID"]


class _Nothing:
    """A catalog without studies that looks at its questions."""

    def find(self, query: Query, **_: object) -> Iterator[object]:
        assert query.level in ("PATIENT", "STUDY", "SERIES", "IMAGE")
        hash(query)
        yield from ()


FINDER = FindService(_Nothing())  # type: ignore[arg-type]  it finds nothing
FIND_STATUSES = {0xA900, 0xC000, 0xC001}


def identifiers(data: bytes) -> None:
    """An identifier is a query or an answered failure, nothing internal.

    The first byte gives its transfer syntax and the information model, the second what was negotiated.
    """
    if len(data) < 2:
        return
    syntax = UID(SYNTAXES[data[0] % len(SYNTAXES)])
    request = FindRequest(
        model="STUDY_ROOT" if data[0] & 0x40 else "PATIENT_ROOT",
        identifier=data[2:],
        transfer_syntax=syntax,
        features=Features(*(bool(data[1] >> bit & 1) for bit in range(len(fields(Features))))),
    )
    for answer in FINDER.answers(request, cancelled=lambda: False):
        _check_answer(answer)
    try:
        parse_selection(decode_identifier(data[2:], syntax), model="STUDY_ROOT")
    except QueryError as error:
        assert error.dimse in FIND_STATUSES


def _check_answer(answer: FindAnswer) -> None:
    assert answer.status in FIND_STATUSES and answer.identifier is None, answer
    assert not answer.comment.startswith("internal error"), answer
    assert len(answer.comment) <= 64
    struct.pack(f"<{len(answer.offending)}I", *answer.offending)
