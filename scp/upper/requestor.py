"""An association that we ask for (PS3.8 7.1), over the same blocking layer as those that we accept.

Every client uses it, and C-MOVE for its sub-operations (see docs/decisions/0008-retrieve.md).
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from pydicom.uid import UID
from pynetdicom._globals import APPLICATION_CONTEXT_NAME
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RJ, A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    MaximumLengthNotification,
    SCP_SCU_RoleSelectionNegotiation,
    SOPClassExtendedNegotiation,
)
from pynetdicom.presentation import PresentationContext, build_context

from sphere.conf.errors import PeerError
from sphere.conf.peers import Peer
from sphere.conf.settings import Settings
from sphere.scp.libraries import prepare_libraries
from sphere.scp.peers import describe
from sphere.scp.upper import command as dimse
from sphere.scp.upper import protocol
from sphere.scp.upper.connection import Connection
from sphere.scp.upper.dataset import Budget
from sphere.scp.upper.messages import Context, Inbox, Limits, Message
from sphere.scp.upper.negotiation import own_items
from sphere.scp.upper.outgoing import Asking, Outgoing, Ready
from sphere.scp.upper.protocol import Aborted, Ended, Released, TooSlow, Violation
from sphere.scp.upper.tls import requestor_context
from sphere.scp.upper.transport import Plain, Tls

MAX_CONTEXTS = 128  # odd ids of one byte (PS3.8 9.3.2.2)
ASSOCIATE_RJ = 0x03
LATE_PDUS = 8  # read after our A-RELEASE-RQ: an answer that was under way (PS3.8 9.2.3, AR-6)
RECEIVING_MEMORY = 32 << 20  # bytes of arriving data sets (C-GET) beyond the first buffer


class PeerSilent(PeerError):
    """A peer did not answer in time: asking it again would only wait again."""


class NoneAccepted(PeerError):
    """A peer accepts none of what was proposed: asking it again would change nothing."""


@dataclass(frozen=True, slots=True)
class Proposed:
    """A presentation context that we propose; `as_scp`: to be asked in it, too (role selection, for C-GET)."""

    abstract_syntax: str
    transfer_syntaxes: tuple[str, ...]
    as_scp: bool = False


@dataclass(slots=True)
class _Answer:
    contexts: dict[int, Context]
    max_pdu: int
    extensions: dict[str, bytes] = field(default_factory=dict)


class Requested:
    """An association that we asked for and got. Every failure of it is a PeerError; it is closed then."""

    def __init__(self, peer: Peer, settings: Settings, connection: Connection, answer: _Answer) -> None:
        self._peer = peer
        self._connection = connection
        self._artim_s = settings.dimse.artim_s
        message_s = settings.dimse.dimse_timeout_s
        limits = Limits(
            memory=settings.storage.memory_mib << 20,
            folder=settings.archive.state_dir / "incoming",
            idle_s=message_s,
            message_s=message_s,
        )
        self.user_contexts = list(answer.contexts.values())
        self.extensions = answer.extensions
        self.open = True
        self._inbox = Inbox(connection, answer.contexts, limits)
        self._asking = Asking(connection, self._inbox, max_pdu=answer.max_pdu, within_s=message_s)

    def __enter__(self) -> Requested:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, GeneratorExit):  # a generator that is not read to its end
            self.release()
        else:
            self.abort()

    def ask(self, context: Context, command: Mapping[str, Any], dataset: Outgoing | None) -> dimse.Command:
        """Send a request and wait for its one response; its command set. Raises PeerError."""
        request = self.ready(context, command, dataset)
        self.start(request)
        return self.answer(request)

    def ready(self, context: Context, command: Mapping[str, Any], dataset: Outgoing | None) -> Ready:
        """A request as it will be sent; raises what `dataset` raises."""
        return self._asking.ready(context.id, command, dataset)

    def start(self, request: Ready) -> None:
        """Send a request, of which nothing else may be under way. Raises PeerError, and what its data set raises."""
        try:
            self._asking.start(request)
        except Ended as error:
            self._failed(error)
        except BaseException:
            self.abort()  # a message that is cut off
            raise

    def answer(self, request: Ready) -> dimse.Command:
        """The command set of the response to a request that was sent. Raises PeerError."""
        message = self.response(request.field, request.number)
        self.finish(message)
        return message.command

    def send(self, context: Context, command: Mapping[str, Any], dataset: Outgoing | None) -> int:
        """Send a request; returns its Message ID. Raises PeerError, and what `dataset` raises."""
        request = self.ready(context, command, dataset)
        self.start(request)
        return request.number

    def response(self, field: int, number: int) -> Message:
        """The next response to a request; a request of the peer is a breach."""
        try:
            return self._asking.response(field, number, _not_now)
        except (Released, Ended, Violation) as error:
            self._failed(error)

    def receive(self) -> Message:
        """The next message, request or response. Raises PeerError."""
        try:
            message = self._inbox.next()
        except (Released, Ended, Violation) as error:
            self._failed(error)
        assert message is not None
        return message

    def respond(self, message: Message, status: int, **elements: object) -> None:
        """Answer a request of the peer. Raises PeerError."""
        try:
            self._asking.respond(message, status, **elements)
        except Ended as error:
            self._failed(error)

    def cancel(self, context: Context, number: int) -> None:
        """C-CANCEL of request `number` (PS3.7 9.3.2.3). Raises PeerError."""
        try:
            self._asking.cancel(context.id, number)
        except Ended as error:
            self._failed(error)

    def finish(self, message: Message) -> None:
        """Give back what the data set of a received message takes."""
        self._inbox.finish(message)

    def release(self) -> None:
        """A-RELEASE; never raises."""
        if not self.open:
            return
        try:
            self._connection.send(protocol.RELEASE_REQUEST, self._artim_s)
            for _ in range(LATE_PDUS):
                received = self._connection.pdu(first_s=self._artim_s, rest_s=self._artim_s)
                if received is not None and received[0] != protocol.P_DATA_TF:
                    break
            if received is not None and received[0] != protocol.RELEASE_RP:
                self._connection.send(protocol.abort(protocol.USER, protocol.UNSPECIFIED), self._artim_s)
        except (Ended, Violation):
            pass  # it is over either way
        finally:
            self._close()

    def abort(self) -> None:
        """A-ABORT; never raises."""
        if not self.open:
            return
        try:
            self._connection.send(protocol.abort(protocol.USER, protocol.UNSPECIFIED), 1.0)
        except Ended:
            pass  # the peer left first
        finally:
            self._close()

    def _failed(self, error: Exception) -> NoReturn:
        self.abort()
        who = describe(self._peer)
        if isinstance(error, TooSlow):
            raise PeerSilent(f"{who} did not answer within dimse.dimse_timeout_s") from None
        if isinstance(error, Aborted):
            raise PeerError(f"{who} aborted the association") from None
        if isinstance(error, Released):
            raise PeerError(f"{who} released the association before it had answered") from None
        raise PeerError(f"{who}: {error}") from None

    def _close(self) -> None:
        self.open = False
        self._inbox.close()
        self._connection.close()


def _not_now(message: Message) -> None:
    raise Violation("a request out of turn", reason=protocol.UNEXPECTED_PARAMETER)


def connect(
    peer: Peer, settings: Settings, proposed: Sequence[Proposed], *, extensions: Mapping[str, bytes] | None = None
) -> Requested:
    """An association with `peer`; `extensions` is Service Class Application Information by SOP class (PS3.7 D.3.3.5).

    At most MAX_CONTEXTS contexts. Raises PeerError, which says what to check, also where no context was accepted.
    """
    prepare_libraries()
    artim_s = settings.dimse.artim_s
    connection = _connection(peer, settings)
    try:
        _handshake(connection, peer, artim_s)
        connection.send(_request(peer, settings, proposed, extensions or {}), artim_s)
        received = connection.pdu(first_s=artim_s, rest_s=artim_s)
        assert received is not None
        answer = _answer(*received, peer, settings, proposed)
    except TooSlow:
        connection.close()
        raise PeerSilent(f"{describe(peer)} takes connections and does not answer an association request") from None
    except (Ended, Violation) as error:
        connection.close()
        raise PeerError(f"{describe(peer)} did not accept the association: {error}") from None
    except BaseException:
        connection.close()
        raise
    return Requested(peer, settings, connection, answer)


def _connection(peer: Peer, settings: Settings) -> Connection:
    tls = requestor_context(peer, settings) if peer.tls else None
    try:
        sock = socket.create_connection((peer.host, peer.port), timeout=settings.dimse.artim_s or None)
    except TimeoutError:
        raise PeerSilent(f"{describe(peer)}: cannot connect (no answer); check host and port") from None
    except socket.gaierror as error:
        raise PeerError(f"{describe(peer)}: host name cannot be resolved ({error.strerror}); check `host`") from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise PeerError(f"{describe(peer)}: cannot connect ({reason}); check host and port, and that it runs") from None
    try:
        transport = Tls(sock, tls, server_name=peer.host) if tls else Plain(sock)
    except OSError as error:  # the peer is gone already
        sock.close()
        raise PeerError(f"{describe(peer)}: cannot connect ({error.strerror}); check that it runs") from None
    connection = Connection(transport, budget=Budget(RECEIVING_MEMORY), max_pdu=settings.dimse.max_pdu)
    connection.begin()
    return connection


def _handshake(connection: Connection, peer: Peer, within_s: float) -> None:
    try:
        connection.handshake(within_s)
    except Ended as error:
        raise PeerError(f"{describe(peer)}: {error}; check port, tls and certificates") from None


def _request(peer: Peer, settings: Settings, proposed: Sequence[Proposed], extensions: Mapping[str, bytes]) -> bytes:
    primitive = A_ASSOCIATE()
    primitive.application_context_name = UID(APPLICATION_CONTEXT_NAME)
    primitive.calling_ae_title = settings.archive.ae_title
    primitive.called_ae_title = peer.ae_title
    primitive.presentation_context_definition_list = [_context(number, one) for number, one in enumerate(proposed)]
    items: list[Any] = list(own_items(settings.dimse.max_pdu))
    for uid in dict.fromkeys(one.abstract_syntax for one in proposed if one.as_scp):
        role = SCP_SCU_RoleSelectionNegotiation()
        role.sop_class_uid, role.scu_role, role.scp_role = UID(uid), False, True
        items.append(role)
    for uid, information in extensions.items():
        extension = SOPClassExtendedNegotiation()
        extension.sop_class_uid, extension.service_class_application_information = UID(uid), information
        items.append(extension)
    primitive.user_information = items
    pdu = A_ASSOCIATE_RQ()
    pdu.from_primitive(primitive)
    return bytes(pdu.encode())


def _context(number: int, proposed: Proposed) -> PresentationContext:
    context = build_context(proposed.abstract_syntax, list(proposed.transfer_syntaxes))
    context.context_id = 2 * number + 1
    return context


def _answer(kind: int, body: memoryview, peer: Peer, settings: Settings, proposed: Sequence[Proposed]) -> _Answer:
    if kind == protocol.ABORT:
        raise Aborted
    if kind == ASSOCIATE_RJ:
        raise PeerError(_rejected(body, peer, settings))
    if kind != protocol.ASSOCIATE_RQ + 1:
        raise Violation(f"PDU type 0x{kind:02X} for an answer", reason=protocol.UNEXPECTED_PDU)
    pdu = A_ASSOCIATE_AC()
    try:
        pdu.decode(protocol.PDU_HEADER.pack(kind, len(body)) + bytes(body))
        primitive = pdu.to_primitive()
    except Exception as error:  # noqa: BLE001  pynetdicom raises whatever the bytes make of it
        raise Violation(f"A-ASSOCIATE-AC ({type(error).__name__})", reason=protocol.INVALID_PARAMETER) from None
    accepted: dict[int, Context] = {}
    for result in primitive.presentation_context_definition_results_list:
        number = result.context_id or 0
        if result.result == 0 and result.transfer_syntax and number // 2 < len(proposed):
            abstract = UID(proposed[number // 2].abstract_syntax)
            accepted[number] = Context(number, abstract, result.transfer_syntax[0], as_scu=True)
    if not accepted:
        raise NoneAccepted(f"{describe(peer)} accepts none of the services asked for")
    items = primitive.user_information
    lengths = [item.maximum_length_received for item in items if isinstance(item, MaximumLengthNotification)]
    granted = {
        str(item.sop_class_uid): item.service_class_application_information or b""
        for item in items
        if isinstance(item, SOPClassExtendedNegotiation)
    }
    return _Answer(accepted, (lengths or [0])[0] or 0, granted)


def _rejected(body: memoryview, peer: Peer, settings: Settings) -> str:
    pdu = A_ASSOCIATE_RJ()
    pdu.decode(protocol.PDU_HEADER.pack(ASSOCIATE_RJ, len(body)) + bytes(body))
    reason = pdu.reason_str if len(body) >= 4 else "no reason"
    return (
        f"{describe(peer)} rejected the association: {reason}; check that it knows us as "
        f"{settings.archive.ae_title!r} and is called {peer.ae_title!r}"
    )
