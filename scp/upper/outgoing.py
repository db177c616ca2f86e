"""Whole messages of ours onto a connection, and what we may ask the peer on an association (PS3.7 6.3.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, cycle
from typing import Any, Final

from sphere.scp.upper import command as dimse
from sphere.scp.upper import protocol
from sphere.scp.upper.connection import SEND_PARTS, Connection
from sphere.scp.upper.messages import Inbox, Message
from sphere.scp.upper.protocol import Violation

BATCH: Final = 1 << 20  # bytes given to the kernel at once
MAX_MESSAGE_ID: Final = 0xFFFF


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A data set to be sent: `size` bytes that come in `parts`."""

    size: int
    parts: Iterable[bytes | memoryview]

    @classmethod
    def of(cls, data: bytes) -> Outgoing:
        """One that is in memory."""
        return cls(len(data), (data,))


Batch = list[bytes | memoryview]  # what the kernel gets at once


@dataclass(frozen=True, slots=True)
class Ready:
    """A request that is ready to be sent: its Message ID, its command field, and its PDUs, the first batch at hand."""

    number: int
    field: int
    batches: Iterator[Batch]


def batches(
    context_id: int, command: Mapping[str, object], dataset: Outgoing | None, *, max_pdu: int
) -> Iterator[Batch]:
    """The PDUs of a message. Raises what the parts of the data set raise."""
    encoded = dimse.encode({**command, "CommandDataSetType": dimse.NO_DATA_SET if dataset is None else 0x0000})
    buffers: Batch = list(protocol.p_data(context_id, encoded, b"", max_pdu=max_pdu))
    size = 0
    if dataset is not None:
        for buffer in protocol.p_data_parts(context_id, dataset.parts, dataset.size, max_pdu=max_pdu):
            buffers.append(buffer)
            size += len(buffer)
            if len(buffers) >= SEND_PARTS or size >= BATCH:
                yield buffers
                buffers, size = [], 0
    if buffers:
        yield buffers


class Asking:
    """Requests of ours, one after the other, on an association."""

    def __init__(self, connection: Connection, inbox: Inbox, *, max_pdu: int, within_s: float) -> None:
        self._connection = connection
        self._inbox = inbox
        self._max_pdu = max_pdu
        self._within_s = within_s
        self._ids = cycle(range(1, MAX_MESSAGE_ID + 1))

    def ready(self, context_id: int, command: Mapping[str, Any], dataset: Outgoing | None) -> Ready:
        """A request (`command` without its ids) as it will be sent; raises what the parts of the data set raise."""
        number = next(self._ids)
        every = batches(context_id, {**command, "MessageID": number}, dataset, max_pdu=self._max_pdu)
        return Ready(number, command["CommandField"], chain([next(every)], every))

    def start(self, request: Ready) -> None:
        """Send a request. `within_s` are the seconds for each batch of it.

        Raises Ended, and what further parts raise: then it is cut off, and the association cannot go on.
        """
        self._put(request.batches)

    def respond(self, message: Message, status: int, **elements: object) -> None:
        """Answer a request of the peer."""
        self._send(message.context.id, dimse.response_to(message.command, status, **elements))

    def cancel(self, context_id: int, number: int) -> None:
        """C-CANCEL of request `number` (PS3.7 9.3.2.3). Raises Ended."""
        self._send(context_id, {"CommandField": dimse.C_CANCEL_RQ, "MessageIDBeingRespondedTo": number})

    def response(self, field: int, number: int, other: Callable[[Message], None]) -> Message:
        """The response to request `number` of command field `field`; the caller finishes it.

        Requests of the peer that come before go to `other`. Raises Released, Ended and Violation.
        """
        while True:
            message = self._inbox.next(within_s=self._within_s)
            assert message is not None
            command = message.command
            if not command["CommandField"] & dimse.RESPONSE:
                other(message)
            elif command["CommandField"] != field | dimse.RESPONSE or _answered(command) != number:
                raise Violation("a response to what was not asked", reason=protocol.UNEXPECTED_PARAMETER)
            elif "Status" not in command:
                raise Violation("a response without status", reason=protocol.INVALID_PARAMETER)
            else:
                return message

    def _send(self, context_id: int, command: Mapping[str, object]) -> None:
        self._put(batches(context_id, command, None, max_pdu=self._max_pdu))

    def _put(self, every: Iterator[Batch]) -> None:
        for batch in every:
            self._connection.send_parts(batch, self._within_s)


def _answered(command: dimse.Command) -> int:
    return int(command.get("MessageIDBeingRespondedTo", -1))
