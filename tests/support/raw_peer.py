"""A peer that says exactly the bytes it is told to, right or wrong (PS3.8 9.3)."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pynetdicom import build_context
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import A_ASSOCIATE, ImplementationClassUIDNotification, MaximumLengthNotification

from sphere.scp.upper import command

VERIFICATION, CT = "1.2.840.10008.1.1", "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"
ABORTED = 0x07


def associate_rq(
    classes: Sequence[str] = (VERIFICATION, CT),
    *,
    max_pdu: int = 16384,
    ours: Iterable[Any] = (),
    calling: str = "RAW",
    called: str = "SPHERE",
    syntax: str = EXPLICIT,
) -> bytes:
    """An A-ASSOCIATE-RQ by pynetdicom: contexts 1, 3, 5, ... for `classes`, in one transfer syntax."""
    request = A_ASSOCIATE()
    request.application_context_name = "1.2.840.10008.3.1.1.1"
    request.calling_ae_title, request.called_ae_title = calling, called
    contexts = [build_context(uid, syntax) for uid in classes]
    for number, context in enumerate(contexts):
        context.context_id = 2 * number + 1
    request.presentation_context_definition_list = contexts
    length, uid = MaximumLengthNotification(), ImplementationClassUIDNotification()
    length.maximum_length_received, uid.implementation_class_uid = max_pdu, "1.2.3"
    request.user_information = [length, uid, *ours]
    return bytes(A_ASSOCIATE_RQ(request).encode())


def pdu(kind: int, body: bytes, *, length: int | None = None) -> bytes:
    """A PDU that claims `length`, its own by default."""
    return struct.pack(">BxI", kind, len(body) if length is None else length) + body


def pdv(context: int, control: int, data: bytes, *, length: int | None = None) -> bytes:
    """A presentation data value that claims `length`, its own by default (PS3.8 9.3.5.1)."""
    return struct.pack(">IBB", len(data) + 2 if length is None else length, context, control) + data


def p_data(*values: bytes) -> bytes:
    """One P-DATA-TF PDU."""
    return pdu(0x04, b"".join(values))


def echo_rq(message_id: int = 1, *, context: int = 1) -> bytes:
    """A C-ECHO-RQ in one PDU."""
    fields = {"AffectedSOPClassUID": VERIFICATION, "CommandField": 0x30, "MessageID": message_id,
              "CommandDataSetType": 0x0101}  # fmt: skip
    return p_data(pdv(context, 3, command.encode(fields)))


def store_rq(uid: str, *, message_id: int = 1, sop_class: str = CT) -> bytes:
    """The command set of a C-STORE-RQ, without PDU."""
    return command.encode(
        {"AffectedSOPClassUID": sop_class, "CommandField": 0x01, "MessageID": message_id, "Priority": 0,
         "CommandDataSetType": 0, "AffectedSOPInstanceUID": uid}
    )  # fmt: skip


def identifying(uid: str, *, sop_class: str = CT) -> bytes:
    """The begin of a data set in Explicit VR Little Endian: the four identifying UIDs, and pixels of unknown length."""
    elements = [
        (0x0008, 0x0016, sop_class),
        (0x0008, 0x0018, uid),
        (0x0020, 0x000D, "1.2.9"),
        (0x0020, 0x000E, "1.2.8"),
    ]
    data = b""
    for group, element, text in elements:
        value = text.encode() + b"\0" * (len(text) % 2)
        data += struct.pack("<HH2sH", group, element, b"UI", len(value)) + value
    return data + struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, 0xFFFFFFFF)


@dataclass
class RawPeer:
    """A connection to an acceptor."""

    sock: socket.socket

    @classmethod
    def connect(cls, port: int, *, timeout: float = 30, source: str = "") -> RawPeer:
        """A connection to 127.0.0.1, from the address `source` if there is one."""
        sock = socket.create_connection(("127.0.0.1", port), timeout=timeout, source_address=(source, 0))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return cls(sock)

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def receive(self) -> tuple[int, bytes] | None:
        """Type and body of the next PDU; None when the connection was closed."""
        header = self._exactly(6)
        if len(header) < 6:
            return None
        kind, length = struct.unpack(">BxI", header)
        return kind, self._exactly(length)

    def associate(self, request: bytes = b"", **options: object) -> A_ASSOCIATE_AC:
        """Send an A-ASSOCIATE-RQ and return the acceptance."""
        self.send(request or associate_rq(**options))  # type: ignore[arg-type]
        answer = self.receive()
        assert answer is not None and answer[0] == 0x02, answer
        accepted = A_ASSOCIATE_AC()
        accepted.decode(pdu(*answer))
        return accepted

    def response(self) -> command.Command:
        """The command set of the next message, which is to be in one PDU."""
        answer = self.receive()
        assert answer is not None and answer[0] == 0x04, answer
        _, _, control = struct.unpack_from(">IBB", answer[1])
        assert control == 3
        return command.decode(answer[1][6:])

    def message(self) -> tuple[command.Command, bytes]:
        """Command set and data set of the next message."""
        parts: tuple[list[bytes], list[bytes]] = [], []  # of data set and command set
        while True:
            answer = self.receive()
            assert answer is not None and answer[0] == 0x04, answer
            _, _, control = struct.unpack_from(">IBB", answer[1])
            parts[control & 1].append(answer[1][6:])
            if control == 2 or (control == 3 and command.decode(b"".join(parts[1]))["CommandDataSetType"] == 0x0101):
                return command.decode(b"".join(parts[1])), b"".join(parts[0])

    def store(self, uid: str, fragments: Iterable[bytes], *, context: int = 3, message_id: int = 1) -> int:
        """C-STORE of a data set in these fragments, one PDU each; the status."""
        self.send(p_data(pdv(context, 3, store_rq(uid, message_id=message_id))))
        before: bytes | None = None
        for fragment in fragments:
            if before is not None:
                self.send(p_data(pdv(context, 0, before)))
            before = fragment
        self.send(p_data(pdv(context, 2, before or b"")))
        return int(self.response()["Status"])

    def abort(self) -> tuple[int, int] | None:
        """Source and reason of the A-ABORT that is to come next; None when the connection was closed without."""
        answer = self.receive()
        if answer is None:
            return None
        assert answer[0] == ABORTED, answer
        assert self.receive() is None
        return answer[1][2], answer[1][3]

    def release(self) -> None:
        """A-RELEASE, which is to be answered."""
        self.send(pdu(0x05, bytes(4)))
        assert self.receive() == (0x06, bytes(4))
        self.close()

    def close(self) -> None:
        self.sock.close()

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.sock.recv(size - len(data))
            if not part:
                break
            data += part
        return data
