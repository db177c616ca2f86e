"""DIMSE messages from P-DATA fragments (PS3.7 6.3.1, PS3.8 Annex E)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydicom.uid import UID

from sphere.scp.upper import protocol
from sphere.scp.upper.command import NO_DATA_SET, Command, CommandError, decode
from sphere.scp.upper.connection import Connection
from sphere.scp.upper.dataset import MAX_FRAGMENTS, ArrivingDataSet
from sphere.scp.upper.protocol import PDV_HEADER, Aborted, Released, Violation

MAX_COMMAND = 1 << 16  # bytes of a command set; real ones have some hundred


@dataclass(frozen=True, slots=True)
class Context:
    """An accepted presentation context."""

    id: int
    abstract_syntax: UID
    transfer_syntax: UID
    as_scu: bool = False  # whether we may send requests in it (PS3.7 D.3.3.4)


@dataclass(slots=True)
class Message:
    """A whole DIMSE message; `dataset` is None where the command set says that none follows.

    What is made of a request while its data set is still to come: `success`, the response 0000H to a C-STORE-RQ as it
    is sent, and `ready`, of the service.
    """

    context: Context
    command: Command
    dataset: ArrivingDataSet | None = None
    success: bytes = b""
    ready: object = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a peer may take of us. Seconds: 0 is no limit."""

    memory: int  # bytes of a data set that wait in memory; more go to a file
    folder: Path  # for those files
    idle_s: float  # from the end of a message to the begin of the next
    message_s: float  # between PDUs of one message, and from the begin to the end of a PDU


class Inbox:
    """The messages of one association, in order; `begun` is told of each whose data set is still to come."""

    def __init__(
        self,
        connection: Connection,
        contexts: Mapping[int, Context],
        limits: Limits,
        *,
        begun: Callable[[Message], None] = lambda _: None,
    ) -> None:
        self._connection = connection
        self._begun = begun
        self._contexts = contexts
        self._limits = limits
        self._body = memoryview(b"")  # of the last P-DATA-TF PDU, from _at on not yet looked at
        self._at = 0
        self._encoded = bytearray()  # command set of the message that is under way
        self._context: Context | None = None
        self._message: Message | None = None  # its command set is complete
        self._give_up = math.inf  # monotonic time after which a data set that cannot be kept is no longer read

    def next(self, *, wait: bool = True, within_s: float | None = None) -> Message | None:
        """The next message; None where `wait` is False and it is not complete.

        `within_s` are the seconds until it begins, where not those of an idle association.

        Raises Released, Ended (closed, lost or aborted by the peer), and Violation.
        """
        while True:
            while self._at < len(self._body):
                if (message := self._fragment()) is not None:
                    return message
            self._make_room()
            if self._message is not None and not self._connection.at_hand():
                self._use_the_time(self._message)
            limits = self._limits
            idle_s = limits.idle_s if within_s is None else within_s
            first_s = idle_s if self._context is None else limits.message_s
            received = self._connection.pdu(first_s=first_s, rest_s=limits.message_s, wait=wait)
            if received is None:
                return None
            kind, self._body = received
            self._at = 0
            if kind != protocol.P_DATA_TF:
                self._control(kind)
            if not self._body:
                raise Violation("a P-DATA-TF PDU without values", reason=protocol.INVALID_PARAMETER)

    def finish(self, message: Message) -> None:
        """Give back what the data set of `message` takes; its content is no longer valid."""
        if message.dataset is not None:
            self._connection.keep -= message.dataset.in_memory
            message.dataset.discard()

    def close(self) -> None:
        """Drop a message that is under way."""
        if self._message is not None:
            self.finish(self._message)
            self._message = None

    def _use_the_time(self, message: Message) -> None:
        """The peer still sends: digest a fragment meanwhile, and no more, as it may be faster than that."""
        if message.dataset is not None:
            message.dataset.digest_one()

    def _control(self, kind: int) -> None:
        if kind == protocol.RELEASE_RQ:
            raise Released
        if kind == protocol.ABORT:
            source, reason = bytes(self._body[2:4]).ljust(2, b"\0")
            raise Aborted(source, reason)
        raise Violation(f"PDU type 0x{kind:02X} out of turn", reason=protocol.UNEXPECTED_PDU)

    def _fragment(self) -> Message | None:
        """Take one presentation data value; the message, if it was its last."""
        body, at = self._body, self._at
        if len(body) - at < PDV_HEADER.size:
            raise Violation("a presentation data value that is cut off", reason=protocol.INVALID_PARAMETER)
        length, context_id, control = PDV_HEADER.unpack_from(body, at)
        end = at + 4 + length
        if length < 2 or end > len(body):
            raise Violation("a presentation data value that overruns its PDU", reason=protocol.INVALID_PARAMETER)
        self._at = end
        self._check(context_id, control)
        data = body[at + PDV_HEADER.size : end]
        if control & protocol.COMMAND:
            return self._command(data, control)
        return self._data(data, control)

    def _check(self, context_id: int, control: int) -> None:
        """Whether a fragment of this kind and context may come now."""
        if self._context is None:
            if context_id not in self._contexts:
                raise Violation(f"presentation context {context_id}", reason=protocol.INVALID_PARAMETER)
            self._context = self._contexts[context_id]
        elif context_id != self._context.id:
            raise Violation("a message in two contexts", reason=protocol.UNEXPECTED_PARAMETER)
        if bool(control & protocol.COMMAND) != (self._message is None):
            raise Violation("command and data set in the wrong order", reason=protocol.UNEXPECTED_PARAMETER)

    def _command(self, data: memoryview, control: int) -> Message | None:
        self._encoded += data
        if len(self._encoded) > MAX_COMMAND:
            raise Violation("a command set without end", reason=protocol.INVALID_PARAMETER)
        if not control & protocol.LAST:
            return None
        try:
            command = decode(bytes(self._encoded))
        except CommandError as error:
            raise Violation(f"command set: {error}", reason=protocol.INVALID_PARAMETER) from None
        assert self._context is not None
        self._encoded.clear()
        self._message = Message(self._context, command)
        if command["CommandDataSetType"] == NO_DATA_SET:
            return self._complete()
        self._message.dataset = ArrivingDataSet(self._limits.folder)
        self._give_up = math.inf
        self._begun(self._message)
        return None

    def _data(self, data: memoryview, control: int) -> Message | None:
        assert self._message is not None
        dataset = self._message.dataset
        assert dataset is not None
        if data:
            held = dataset.in_memory
            dataset.add(data)
            self._connection.keep += dataset.in_memory - held
            if dataset.size > self._limits.memory or dataset.fragments > MAX_FRAGMENTS:
                self._spill(dataset)
        if dataset.error is not None:
            self._give_up_at_last()
        return self._complete() if control & protocol.LAST else None

    def _make_room(self) -> None:
        if self._connection.crowded() and self._message is not None and self._message.dataset is not None:
            self._spill(self._message.dataset)

    def _spill(self, dataset: ArrivingDataSet) -> None:
        self._connection.keep -= dataset.in_memory
        dataset.spill()

    def _give_up_at_last(self) -> None:
        """The disk is full: read what is left, so that the failure can be answered, but not for ever."""
        now = time.monotonic()
        if self._give_up == math.inf and self._limits.idle_s:
            self._give_up = now + self._limits.idle_s
        if now > self._give_up:
            raise Violation("a data set without end, and no room for it", reason=protocol.UNSPECIFIED)

    def _complete(self) -> Message:
        message, self._message, self._context = self._message, None, None
        assert message is not None
        return message
