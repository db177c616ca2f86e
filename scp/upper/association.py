"""One association, from the accepted connection to its end (PS3.8 9.2, as the acceptor)."""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol

from sphere.scp.upper import command as dimse
from sphere.scp.upper import protocol
from sphere.scp.upper.connection import Connection
from sphere.scp.upper.messages import Context, Inbox, Limits, Message
from sphere.scp.upper.negotiation import Agreement, Agreements, Proposal, read_request
from sphere.scp.upper.outgoing import Asking, Outgoing, Ready
from sphere.scp.upper.protocol import Aborted, Ended, Rejection, Released, TooSlow, Violation

log = logging.getLogger(__name__)

_decoding = threading.Lock()  # one request at a time: pynetdicom makes some MB of the longest, and holds the GIL anyway

UNRECOGNIZED_OPERATION = 0x0211  # PS3.7 C.5.18
PROCESSING_FAILURE = 0x0110  # PS3.7 C.5.9
PAUSE_S = 0.25  # seconds between looks at whether to stop
MAX_CANCELS = 16  # remembered at once; they name operations that may already be over
MAX_WAITING = 8  # requests that come before the one being served is answered; asynchronous operations are not offered
HELD = 1 << 15  # bytes of responses that are sent together, where more are at hand
LOOK_S = 0.002  # seconds between looks at what came while a request is answered: it may answer thousands of times
_numbers = count(1)


@dataclass(frozen=True, slots=True)
class Response:
    """One response of a service: status, further command elements by keyword, and an encoded data set.

    With `more`, the service has the next one at hand, and they are sent together.
    """

    status: int
    elements: Mapping[str, Any] = field(default_factory=dict)
    dataset: bytes = b""
    more: bool = False


class Admission(Protocol):
    """Who is at the other end, and what holds for the association."""

    @property
    def limits(self) -> Limits: ...

    def close(self) -> None:
        """The association is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptor:
    """What every association of a receiver shares. Seconds: 0 is no limit."""

    services: Mapping[int, Service]  # by the command field of their request
    begun: Mapping[int, Callable[[Message, Association], object]] = field(default_factory=dict)
    """By command field, what makes `Message.ready`; it never raises."""
    admit: Callable[[Proposal, str], Admission]  # raises Rejection; gets the proposal and the peer's address
    places: threading.BoundedSemaphore  # of associations at once
    max_pdu: int  # bytes that we take in a P-DATA-TF PDU
    artim_s: float
    agreements: Agreements = field(default_factory=Agreements)


class Association:
    """What a service sees of the association that its request came on.

    `tally` counts what happened, for the line of the log at its end.
    """

    def __init__(self, connection: Connection, address: str, acceptor: Acceptor) -> None:
        self.id = f"{os.getpid()}-{next(_numbers)}"
        self.address = address
        self.calling = self.called = ""
        self.tally: Counter[str] = Counter()
        self._connection = connection
        self._acceptor = acceptor
        self._agreement: Agreement
        self._within_s: float  # seconds between PDUs of a message
        self._inbox: Inbox
        self._asking: Asking
        self._waiting: deque[Message] = deque()  # requests that came while another was served
        self._cancelled: deque[int] = deque(maxlen=MAX_CANCELS)
        self._looked = 0.0
        self._placed = False
        self._admission: Admission | None = None
        self._over: Exception | None = None  # what ended the association while a service was at work

    def run(self) -> None:
        """Serve until the end; every way that an association can end is logged once, here."""
        started, end, linger = time.monotonic(), "", True
        try:
            self._establish()
            self._serve()
        except Released:
            end, linger = "released", False
            self._give_up_place()  # first: the peer may ask for its next association the moment it is answered
            self._last_words(protocol.RELEASE_RESPONSE)
        except Rejection as rejection:
            end = f"rejected {rejection}"
            self._last_words(rejection.encode())
        except Violation as violation:
            end = f"aborted: {violation}"
            self._abort(violation)
        except Ended as ended:
            end, linger = str(ended), False
        except Exception as error:  # noqa: BLE001  a defect of ours ends this association, and no other
            where = traceback.extract_tb(error.__traceback__)[-1]
            end = f"aborted: internal error ({type(error).__name__} in {where.name}, line {where.lineno})"
            self._last_words(protocol.abort(protocol.USER, protocol.UNSPECIFIED))
        finally:
            self._give_up_place()
            self._connection.close(linger=linger)
        log.log(
            logging.INFO if end == "released" else logging.WARNING,
            "association closed id=%s calling=%s address=%s %s s=%.3f: %s",
            self.id, self.calling, self.address, " ".join(f"{what}={n}" for what, n in sorted(self.tally.items())),
            time.monotonic() - started, end,
        )  # fmt: skip

    def _give_up_place(self) -> None:
        """No longer count among the associations of this receiver and of the peer."""
        if self._placed:
            self._placed = False
            self._acceptor.places.release()
        if self._admission is not None:
            self._admission.close()
            self._admission = None

    def stop(self) -> None:
        """End the association at the next chance; may be called from any thread."""
        self._connection.stopping = True

    @property
    def accepted(self) -> bool:
        """Whether it is established, and not over."""
        return self._placed

    @property
    def admission(self) -> Admission:
        """What `Acceptor.admit` said."""
        assert self._admission is not None
        return self._admission

    def pause(self, seconds: float) -> None:
        """Stand still for so long, or until the association is to be stopped."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self._connection.stopping:
            time.sleep(min(left, PAUSE_S))

    def extension(self, sop_class: str) -> bytes:
        """The application information granted to `sop_class`, b"" for none (PS3.7 D.3.3.5)."""
        return self._agreement.extensions.get(sop_class, b"")

    @property
    def user_contexts(self) -> list[Context]:
        """The presentation contexts in which we may ask: role selection made us a service class user of them."""
        return [context for context in self._agreement.contexts.values() if context.as_scu]

    def ask(self, context: Context, command: Mapping[str, Any], dataset: Outgoing | None) -> dimse.Command:
        """Send a request of ours while one of the peer's is served; the command set of its response.

        Raises Released, Ended and Violation, after which nothing can be sent any more, and what `dataset` raises.
        """
        request = self.ready(context, command, dataset)
        self.start(request)
        return self.answer(request)

    def ready(self, context: Context, command: Mapping[str, Any], dataset: Outgoing | None) -> Ready:
        """A request of ours as it will be sent; raises what `dataset` raises."""
        return self._asking.ready(context.id, command, dataset)

    def start(self, request: Ready) -> None:
        """Send a request of ours while one of the peer's is served, and none of ours.

        Raises Ended and Violation, after which nothing can be sent any more.
        """
        if self._over is not None:
            raise self._over
        try:
            self._asking.start(request)
        except Ended as end:
            self._over = end
            raise
        except Exception as error:
            self._over = Violation("a data set that could not be read to its end", reason=protocol.UNSPECIFIED)
            raise self._over from error

    def answer(self, request: Ready) -> dimse.Command:
        """The command set of the response to a request that was sent; raises Released, Ended and Violation."""
        if self._over is not None:
            raise self._over
        try:
            message = self._asking.response(request.field, request.number, self._take)
        except (Released, Ended, Violation) as end:
            self._over = end
            raise
        self._inbox.finish(message)
        return message.command

    def waits(self, request: Message) -> bool:
        """Whether the peer is still there, and has asked for nothing else since `request`."""
        return not self.cancelled(request) and not self._waiting

    def cancelled(self, request: Message) -> bool:
        """Whether to stop working on `request`: the peer sent C-CANCEL, or there is nobody any more to answer.

        Known LOOK_S late.
        """
        now = time.monotonic()
        if now - self._looked >= LOOK_S:
            self._looked = now
            self._look()
        return self._over is not None or request.command["MessageID"] in self._cancelled

    def _look(self) -> None:
        try:
            while self._over is None and not self._waiting and (message := self._inbox.next(wait=False)):
                self._take(message)
        except (Released, Ended, Violation) as end:
            self._over = end

    def _establish(self) -> None:
        artim_s, started = self._acceptor.artim_s, time.monotonic()
        self._connection.handshake(artim_s)
        left_s = max(0.001, artim_s - (time.monotonic() - started)) if artim_s else 0
        received = self._connection.pdu(first_s=left_s, rest_s=left_s)
        assert received is not None
        kind, body = received
        if kind == protocol.ABORT:
            raise Aborted
        if kind != protocol.ASSOCIATE_RQ:
            raise Violation(f"PDU type 0x{kind:02X} before A-ASSOCIATE-RQ", reason=protocol.UNEXPECTED_PDU)
        with _decoding:
            proposal = read_request(body)
        self.calling, self.called = proposal.calling, proposal.called
        self._admission = self._acceptor.admit(proposal, self.address)
        self._placed = self._acceptor.places.acquire(blocking=False)
        if not self._placed:
            raise Rejection(*protocol.LOCAL_LIMIT_EXCEEDED)
        self._agreement = self._acceptor.agreements.on(proposal, max_pdu=self._acceptor.max_pdu)
        limits = self._admission.limits
        self._inbox = Inbox(self._connection, self._agreement.contexts, limits, begun=self._begun)
        within_s = self._within_s = limits.message_s
        self._asking = Asking(self._connection, self._inbox, max_pdu=self._agreement.max_pdu, within_s=within_s)
        self._connection.begin()
        self._connection.send(self._agreement.answer, artim_s)
        log.info(
            "association accepted id=%s calling=%s called=%s address=%s contexts=%d refused=%d",
            self.id, self.calling, self.called, self.address, len(self._agreement.contexts), self._agreement.refused,
        )  # fmt: skip

    def _serve(self) -> None:
        try:
            while True:
                message = self._waiting.popleft() if self._waiting else self._inbox.next()
                assert message is not None
                self._handle(message)
                if self._over is not None:
                    raise self._over
        finally:
            self._inbox.close()

    def _begun(self, message: Message) -> None:
        """Its data set is still to come: what can be made of the command alone costs no time now."""
        command = message.command
        if command["CommandField"] == dimse.C_STORE_RQ and "MessageID" in command:
            encoded = dimse.encoded_response(command, 0x0000)
            parts = protocol.p_data(message.context.id, encoded, b"", max_pdu=self._agreement.max_pdu)
            message.success = b"".join(parts)
        if (begun := self._acceptor.begun.get(command["CommandField"])) is not None:
            message.ready = begun(message, self)

    def _take(self, message: Message) -> None:
        """A message that came while a request is being served."""
        if message.command["CommandField"] == dimse.C_CANCEL_RQ:
            self._cancelled.append(message.command.get("MessageIDBeingRespondedTo", -1))
        elif len(self._waiting) < MAX_WAITING:
            self._waiting.append(message)
        else:
            self._inbox.finish(message)
            raise Violation("more requests at once than are answered", reason=protocol.UNSPECIFIED)

    def _handle(self, message: Message) -> None:
        kind = message.command["CommandField"]
        try:
            if kind == dimse.C_CANCEL_RQ:
                return  # what it meant has been answered already
            if kind & dimse.RESPONSE or "MessageID" not in message.command:
                raise Violation(f"command 0x{kind:04X} out of turn", reason=protocol.UNEXPECTED_PARAMETER)
            service = self._acceptor.services.get(kind, _unrecognized)
            self._looked = 0.0
            self._respond(message, service(message, self))
            self._cancelled.clear()
        finally:
            self._inbox.finish(message)

    def _respond(self, message: Message, responses: Iterable[Response]) -> None:
        held, heads = bytearray(), dict[int, bytes]()
        for response in responses:
            if self._over is not None:
                break
            held += self._encoded(message, response, heads)
            if not response.more or len(held) >= HELD:
                self._connection.send(bytes(held), self._within_s)
                held.clear()

    def _encoded(self, message: Message, response: Response, heads: dict[int, bytes]) -> bytes:
        """The PDUs of a response; `heads` keeps command sets that are repeated, by their status."""
        if message.success and not (response.status or response.elements or response.dataset):
            return message.success
        context, max_pdu = message.context.id, self._agreement.max_pdu
        head = heads.get(response.status) if response.dataset and not response.elements else None
        if head is None:
            more = {**response.elements, "CommandDataSetType": 0x0000} if response.dataset else response.elements
            command = dimse.encoded_response(message.command, response.status, **more)
            head = b"".join(protocol.p_data(context, command, b"", max_pdu=max_pdu))
            if response.dataset and not response.elements:
                heads[response.status] = head
        if not response.dataset:
            return head
        return head + b"".join(protocol.p_data(context, b"", response.dataset, max_pdu=max_pdu))

    def _abort(self, violation: Violation) -> None:
        """Say A-ABORT as PS3.8 9.2 wants it: before an association by the user (AA-1), or not at all (AA-2: ARTIM)."""
        if self._placed:
            self._last_words(protocol.abort(violation.source, violation.reason))
        elif not isinstance(violation, TooSlow):
            self._last_words(protocol.abort(protocol.USER, protocol.UNSPECIFIED))

    def _last_words(self, pdu: bytes) -> None:
        try:
            self._connection.send(pdu, self._acceptor.artim_s)
        except Ended:
            return  # it was the peer who left


Service = Callable[[Message, Association], Iterable[Response]]


def _unrecognized(message: Message, association: Association) -> Iterable[Response]:
    """The answer to a request that no service is there for."""
    association.tally["unrecognized"] += 1
    yield Response(UNRECOGNIZED_OPERATION)
