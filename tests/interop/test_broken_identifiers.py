"""Requests whose data set is broken, over an association: refused with the element at fault, and nothing is sent."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import pytest
from pydicom.uid import UID

from sphere.scp import client
from sphere.scp.upper import command
from tests.support.headers import DEFLATED, EXPLICIT_BE, EXPLICIT_LE, IMPLICIT_LE
from tests.support.ports import free_port
from tests.support.raw_peer import RawPeer, associate_rq, p_data, pdv
from tests.support.receiver import Receiver, running_receiver
from tests.support.samples import make_instance

pytestmark = pytest.mark.interop

FIND, MOVE, GET = (f"1.2.840.10008.5.1.4.1.2.1.{number}" for number in (1, 2, 3))  # Patient Root
FIELDS = {FIND: 0x20, MOVE: 0x21, GET: 0x10}
COMMITMENT, WELL_KNOWN = "1.2.840.10008.1.20.1", "1.2.840.10008.1.20.1.1"
REFUSED, INVALID_ARGUMENT = 0xA900, 0x0115
SYNTAXES = (IMPLICIT_LE, EXPLICIT_LE, EXPLICIT_BE, DEFLATED)

LEVEL, PATIENT_ID, PATIENT_NAME, STUDY_UID = 0x00080052, 0x00100020, 0x00100010, 0x0020000D
ROWS, VOLUME, POINTER, REFERENCED = 0x00280010, 0x00189305, 0x00280009, 0x00081110
Elements = list[tuple[int, str, bytes]]
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
OTHER = (PATIENT_ID, "LO", b"999999")  # a patient whom the archive has; who is asked for is 9999991234


def encoded(elements: Elements, syntax: str, *, lengths: dict[int, int] | None = None) -> bytes:
    """A data set, not deflated; `lengths` are what elements say instead of their own."""
    order = ">" if syntax == EXPLICIT_BE else "<"
    data = b""
    for tag, vr, value in elements:
        length = (lengths or {}).get(tag, len(value))
        data += struct.pack(f"{order}HH", tag >> 16, tag & 0xFFFF)
        if syntax == IMPLICIT_LE or tag >> 16 == 0xFFFE:
            data += struct.pack(f"{order}I", length) + value
        elif vr in ("SQ", "UN"):
            data += vr.encode() + bytes(2) + struct.pack(f"{order}I", length) + value
        else:
            data += vr.encode() + struct.pack(f"{order}H", length) + value
    return data


def sent(data: bytes, syntax: str) -> bytes:
    """As it goes over the wire."""
    if syntax != DEFLATED:
        return data
    stream = zlib.compressobj(wbits=-15)
    return stream.compress(data) + stream.flush()


def broken(syntax: str) -> Iterator[tuple[str, bytes, int | None]]:
    """What is wrong, the data set, and the element at fault (None where nobody can know)."""
    level: Elements = [(LEVEL, "CS", b"PATIENT ")]
    whole = [*level, (PATIENT_ID, "LO", b"9999991234")]
    order = ">" if syntax == EXPLICIT_BE else "<"
    yield "a cut value", encoded(whole, syntax)[:-4], PATIENT_ID
    yield "a cut head", encoded([*level, OTHER], syntax) + struct.pack(f"{order}HH", 0x10, 0x40) + b"CS", 0x00100040
    yield "a cut tag", encoded([*level, OTHER], syntax) + b"\x10\x00\x40", None
    yield "one byte more", encoded([*level, OTHER], syntax) + b"\0", None
    yield "more than there is", encoded([*level, OTHER], syntax, lengths={PATIENT_ID: 12}), PATIENT_ID
    yield "US of 1 byte", encoded([*level, OTHER, (ROWS, "US", b"\1")], syntax), ROWS
    yield "US of 3 bytes", encoded([*level, OTHER, (ROWS, "US", b"\1\0\0")], syntax), ROWS
    yield "FD of 4 bytes", encoded([*level, (VOLUME, "FD", b"0.5 "), OTHER], syntax), VOLUME
    yield "AT of 2 bytes", encoded([*level, OTHER, (POINTER, "AT", b"\1\0")], syntax), POINTER
    yield "two of one", encoded([*level, OTHER, (PATIENT_ID, "LO", b"999998")], syntax), PATIENT_ID
    inner = encoded([OTHER], syntax)
    item = encoded([(ITEM, "", inner)], syntax)
    yield "an item too long", encoded([(REFERENCED, "SQ", item[:-1]), *level, OTHER], syntax), REFERENCED
    within = encoded([(ITEM, "", encoded([OTHER], syntax, lengths={PATIENT_ID: 10}))], syntax)
    yield "a cut value in an item", encoded([*level, (REFERENCED, "SQ", within), OTHER], syntax), PATIENT_ID
    yield "no item", encoded([*level, (REFERENCED, "SQ", inner), OTHER], syntax), REFERENCED
    endless = [*level, OTHER, (REFERENCED, "SQ", item)]
    yield "no end", encoded(endless, syntax, lengths={REFERENCED: 0xFFFFFFFF}), None
    yield "an end alone", encoded([*level, OTHER, (ITEM_END, "", b"")], syntax), ITEM_END
    yield (
        "text without length",
        encoded([*level, (PATIENT_ID, "UN", item)], syntax, lengths={PATIENT_ID: 2**32 - 1}),
        (PATIENT_ID),
    )
    if syntax != IMPLICIT_LE:
        yield "a VR of nobody", encoded([*level, (PATIENT_ID, "ZZ", b"999999")], syntax), PATIENT_ID
        yield "text for a number", encoded([*level, OTHER, (ROWS, "IS", b"51")], syntax), ROWS
        yield (
            "a private FD",
            encoded([*level, OTHER, (0x00110010, "LO", b"ME"), (0x00111001, "FD", b"12")], syntax),
            (0x00111001),
        )


def asked(peer: RawPeer, service: str, data: bytes, number: int) -> list[command.Command]:
    """Every response to a request; none has an identifier."""
    peer.send(request(service, data, number))
    responses = [peer.response()]
    while responses[-1]["Status"] in (0xFF00, 0xFF01):
        responses.append(peer.response())
    return responses


def request(service: str, data: bytes, number: int) -> bytes:
    fields = {"AffectedSOPClassUID": service, "CommandField": FIELDS[service], "MessageID": number, "Priority": 0,
              "CommandDataSetType": 0}  # fmt: skip
    if service == MOVE:
        fields["MoveDestination"] = "AWAY"
    return p_data(pdv(1, 3, command.encode(fields)), pdv(1, 2, data))


@pytest.fixture(scope="module")
def receiver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    """With the other patient's instance, and a destination where nobody listens."""
    base = tmp_path_factory.mktemp("broken")
    peers = [{"name": "away", "ae_title": "AWAY", "host": "127.0.0.1", "port": free_port()}]
    with running_receiver(base / "archive", {"peers": peers}) as running:
        path = make_instance(base / "one.dcm", PatientID="999999", Rows=1)
        assert all(one.stored for one in client.store(running.peer, [path], settings=running.settings))
        yield running
        assert "query failed status=0xA900" in running.log
        assert not [word for word in ("pydicom", "Warning", "9999991234", "999999 ") if word in running.log]


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda uid: UID(uid).name)
@pytest.mark.parametrize("service", [FIND, MOVE, GET], ids=["find", "move", "get"])
def test_a_broken_identifier_is_refused(receiver: Receiver, service: str, syntax: str) -> None:
    peer = RawPeer.connect(receiver.port)
    accepted = peer.associate(associate_rq([service], syntax=syntax))
    assert accepted.presentation_context[0].result == 0
    for number, (what, data, offending) in enumerate(broken(syntax), 1):
        [response] = asked(peer, service, sent(data, syntax), number)
        assert response["Status"] == REFUSED, what
        assert offending is None or response.get("OffendingElement") == [offending], (what, response)
        assert "9999" not in str(response.get("ErrorComment")), what
        assert not response.get("NumberOfCompletedSuboperations"), what
    if syntax == DEFLATED:
        whole = sent(encoded([(LEVEL, "CS", b"PATIENT "), OTHER], syntax), syntax)
        for count in range(1, len(whole)):
            [response] = asked(peer, service, whole[:count], 100 + count)
            assert response["Status"] == REFUSED, count
    peer.release()


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda uid: UID(uid).name)
def test_what_does_no_harm_is_taken(receiver: Receiver, syntax: str) -> None:
    """Odd lengths, elements out of their order, group lengths, and items with and without lengths."""
    level = (LEVEL, "CS", b"PATIENT")
    odd = [(PATIENT_ID, "LO", b"999999 "), level, (PATIENT_NAME, "PN", b""), (0x00080000, "UL", bytes(4))]
    closed = encoded([(ITEM, "", encoded([(PATIENT_ID, "LO", b"")], syntax))], syntax)
    endless = 0xFFFFFFFF
    opened = encoded([(ITEM, "", b"")], syntax, lengths={ITEM: endless}) + encoded([(ITEM_END, "", b"")], syntax)
    opened += encoded([(SEQUENCE_END, "", b"")], syntax)
    peer = RawPeer.connect(receiver.port)
    peer.associate(associate_rq([FIND], syntax=syntax))
    for number, data in enumerate(
        (
            encoded(odd, syntax),
            encoded([*odd, (REFERENCED, "SQ", closed)], syntax),
            encoded([*odd, (REFERENCED, "SQ", opened)], syntax, lengths={REFERENCED: endless}),
            encoded([*odd, (ROWS, "US", b"")], syntax),
        ),
        1,
    ):
        peer.send(request(FIND, sent(data, syntax), number))
        match, identifier, final = peer.response(), peer.receive(), peer.response()
        assert (match["Status"], final["Status"]) == (0xFF00, 0), number
        assert identifier is not None and b"999999" in (inflated(identifier[1][6:], syntax))
    peer.release()


def inflated(data: bytes, syntax: str) -> bytes:
    return zlib.decompress(data, -15) if syntax == DEFLATED else data


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda uid: UID(uid).name)
def test_a_broken_commitment_request_is_refused(receiver: Receiver, syntax: str) -> None:
    reference = encoded([(0x00081150, "UI", b"1.2.840.10008.5.1.4.1.1.2\0"), (0x00081155, "UI", b"1.2.9.1234")], syntax)
    items = encoded([(ITEM, "", reference)], syntax)
    whole = encoded([(0x00081195, "UI", b"1.2.3.4\0"), (0x00081199, "SQ", items)], syntax)
    peer = RawPeer.connect(receiver.port)
    peer.associate(associate_rq([COMMITMENT], syntax=syntax))
    fields = {"RequestedSOPClassUID": COMMITMENT, "CommandField": 0x0130, "MessageID": 1, "CommandDataSetType": 0,
              "RequestedSOPInstanceUID": WELL_KNOWN, "ActionTypeID": 1}  # fmt: skip
    cuts = [
        sent(whole[:-2], syntax),
        sent(whole[:-8], syntax),
        sent(whole + b"\x08\0", syntax),
        sent(whole, syntax)[:-2],
    ]
    for data in cuts:
        peer.send(p_data(pdv(1, 3, command.encode(fields)), pdv(1, 2, data)))
        assert peer.response()["Status"] == INVALID_ARGUMENT
    assert not list((receiver.settings.archive.state_dir / "commitment").glob("*.json"))
    peer.release()
