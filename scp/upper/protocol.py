"""Words of PS3.8: PDU types, reasons, the PDUs that are a few fixed bytes, and what ends an association."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Final

ASSOCIATE_RQ: Final = 0x01  # PDU types (PS3.8 9.3)
P_DATA_TF: Final = 0x04
RELEASE_RQ: Final = 0x05
RELEASE_RP: Final = 0x06
ABORT: Final = 0x07
TYPES: Final = range(ASSOCIATE_RQ, ABORT + 1)

PDU_HEADER: Final = struct.Struct(">BxI")  # type, length of what follows
PDV_HEADER: Final = struct.Struct(">IBB")  # length of the rest, context id, control (PS3.8 9.3.5, E.2)
_HEADERS: Final = struct.Struct(">BxIIBB")  # of a PDU and of the one value in it
COMMAND: Final = 0x01  # bits of the message control header
LAST: Final = 0x02
MAX_SENT_PDU: Final = 1 << 18  # bytes of a P-DATA-TF that we send at most, however much the peer would take

USER: Final = 0  # source of an A-ABORT (PS3.8 9.3.8)
PROVIDER: Final = 2
UNSPECIFIED: Final = 0  # its reason, where the source is PROVIDER
UNRECOGNIZED_PDU: Final = 1
UNEXPECTED_PDU: Final = 2
UNEXPECTED_PARAMETER: Final = 5
INVALID_PARAMETER: Final = 6

RELEASE_RESPONSE: Final = PDU_HEADER.pack(RELEASE_RP, 4) + bytes(4)
RELEASE_REQUEST: Final = PDU_HEADER.pack(RELEASE_RQ, 4) + bytes(4)


class Violation(Exception):
    """The peer broke the protocol, or was too slow: it is told by an A-ABORT with `source` and `reason`."""

    def __init__(self, what: str, *, reason: int, source: int = PROVIDER) -> None:
        super().__init__(what)
        self.reason = reason
        self.source = source


class TooSlow(Violation):
    """The peer broke no rule but a limit of time."""

    def __init__(self, what: str) -> None:
        super().__init__(what, reason=UNSPECIFIED)


class Ended(Exception):
    """The connection is over, and there is nobody left to tell: closed, reset, or aborted by the peer."""


class Aborted(Ended):
    """The peer sent an A-ABORT (PS3.8 9.3.8)."""

    def __init__(self, source: int = USER, reason: int = UNSPECIFIED) -> None:
        super().__init__(f"aborted by the peer source={source} reason={reason}")


class Released(Exception):
    """The peer asked for the end of the association (A-RELEASE-RQ)."""


class Rejection(Exception):
    """The association is refused: `result`, `source` and `reason` of A-ASSOCIATE-RJ (PS3.8 9.3.4)."""

    def __init__(self, result: int, source: int, reason: int) -> None:
        super().__init__(f"result={result} source={source} reason={reason}")
        self.result = result
        self.source = source
        self.reason = reason

    def encode(self) -> bytes:
        """The A-ASSOCIATE-RJ PDU."""
        return PDU_HEADER.pack(0x03, 4) + bytes((0, self.result, self.source, self.reason))


APPLICATION_CONTEXT_NOT_SUPPORTED: Final = (1, 1, 2)  # permanent, by the service user
CALLING_AE_NOT_RECOGNIZED: Final = (1, 1, 3)
CALLED_AE_NOT_RECOGNIZED: Final = (1, 1, 7)
PROTOCOL_VERSION_NOT_SUPPORTED: Final = (1, 2, 2)  # permanent, by the provider (ACSE)
LOCAL_LIMIT_EXCEEDED: Final = (2, 3, 2)  # transient, by the provider (presentation)


def abort(source: int, reason: int) -> bytes:
    """The A-ABORT PDU (PS3.8 9.3.8)."""
    return PDU_HEADER.pack(ABORT, 4) + bytes((0, 0, source, reason))


def p_data(context_id: int, command: bytes, dataset: bytes, *, max_pdu: int) -> Iterator[bytes]:
    """P-DATA-TF PDUs of a whole message; `max_pdu` is the length in bytes that the peer announced (PS3.8 D.1), 0: any.

    Command and data set never share a PDU: not every peer would take that.
    """
    room = max(1, max_pdu - PDV_HEADER.size) if max_pdu else max(len(command), len(dataset), 1)
    if not dataset and 0 < len(command) <= room:  # as of each C-STORE-RSP
        size = len(command) + PDV_HEADER.size
        yield _HEADERS.pack(P_DATA_TF, size, size - 4, context_id, COMMAND | LAST) + command
        return
    for kind, data in ((COMMAND, command), (0, dataset)):
        for start in range(0, len(data), room):
            part = data[start : start + room]
            control = kind | (LAST if start + room >= len(data) else 0)
            header = PDU_HEADER.pack(P_DATA_TF, len(part) + PDV_HEADER.size)
            yield header + PDV_HEADER.pack(len(part) + 2, context_id, control) + part


def p_data_parts(
    context_id: int, parts: Iterable[bytes | memoryview], size: int, *, max_pdu: int
) -> Iterator[bytes | memoryview]:
    """P-DATA-TF PDUs of a data set of `size` bytes that comes in `parts`, as buffers: headers, and views of the parts.

    Fragments are of even length (PS3.8 E.2 lets a data set be cut anywhere; DCMTK wants them even). Raises ValueError
    where the parts do not hold `size` bytes.
    """
    room = (min(max_pdu or MAX_SENT_PDU, MAX_SENT_PDU) - PDV_HEADER.size) & ~1 or 1
    pdu_left = 0
    for part in parts:
        view = memoryview(part)
        if len(view) > size + pdu_left:
            raise ValueError("a data set that is longer than it was said to be")
        while view:
            if not pdu_left:
                pdu_left = min(room, size)
                size -= pdu_left
                rest = pdu_left + PDV_HEADER.size
                yield _HEADERS.pack(P_DATA_TF, rest, pdu_left + 2, context_id, 0 if size else LAST)
            yield view[:pdu_left]
            taken = min(pdu_left, len(view))
            view = view[taken:]
            pdu_left -= taken
    if size or pdu_left:
        raise ValueError("a data set that ends early")
