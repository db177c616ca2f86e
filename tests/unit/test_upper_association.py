"""The upper layer over a real socket, with services of the test: what is right, and what is hostile."""

from __future__ import annotations

import logging
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pynetdicom.pdu_primitives import AsynchronousOperationsWindowNegotiation, UserIdentityNegotiation

from sphere.conf.settings import Settings, from_dict
from sphere.ingest.members import FileRange
from sphere.scp.upper import command, protocol
from sphere.scp.upper.association import MAX_WAITING, Acceptor, Association, Response
from sphere.scp.upper.messages import MAX_COMMAND, Limits, Message
from sphere.scp.upper.negotiation import MAX_KNOWN, Agreements, Proposal, read_request
from sphere.scp.upper.protocol import CALLING_AE_NOT_RECOGNIZED, Rejection
from sphere.scp.upper.server import Server
from tests.support.raw_peer import (
    CT,
    EXPLICIT,
    VERIFICATION,
    RawPeer,
    associate_rq,
    echo_rq,
    p_data,
    pdu,
    pdv,
    store_rq,
)

pytestmark = pytest.mark.unit

MEMORY = 1 << 20
INVALID = (protocol.PROVIDER, protocol.INVALID_PARAMETER)
UNEXPECTED = (protocol.PROVIDER, protocol.UNEXPECTED_PDU)
OUT_OF_ORDER = (protocol.PROVIDER, protocol.UNEXPECTED_PARAMETER)
SILENT = (protocol.PROVIDER, protocol.UNSPECIFIED)
MANY = 0x0020  # a request that is answered a thousand times
ASKS = 0x0FE1  # a service that asks the peer
FLOODS = 0x0FE2  # a service that has FLOOD answers at hand, of 1 KiB each
FLOOD = 32_768


class Bench:
    """A server whose services remember what they got."""

    def __init__(self, tmp_path: Path, **dimse: Any) -> None:
        self.settings: Settings = from_dict({"dimse": {"port": 0, "max_pdu": 16384, **dimse}}, base=tmp_path)
        self.stored: list[tuple[str, bytes, bool]] = []
        self.answered = self.closed = 0
        self.places = threading.BoundedSemaphore(self.settings.dimse.max_associations)
        self.limits = Limits(
            memory=MEMORY,
            folder=tmp_path / "incoming",
            idle_s=self.settings.dimse.network_timeout_s,
            message_s=self.settings.dimse.dimse_timeout_s,
        )
        acceptor = Acceptor(
            services={0x30: self.echo, 0x01: self.store, MANY: self.many, ASKS: self.asks, FLOODS: self.flood},
            admit=self.admit,
            places=self.places,
            max_pdu=self.settings.dimse.max_pdu,
            artim_s=self.settings.dimse.artim_s,
        )
        self.server = Server(self.settings, acceptor)
        threading.Thread(target=self.server.serve, daemon=True).start()

    def admit(self, proposal: Proposal, address: str) -> Bench:
        if proposal.calling != "RAW":
            raise Rejection(*CALLING_AE_NOT_RECOGNIZED)
        return self

    def close(self) -> None:
        self.closed += 1

    def echo(self, message: Message, association: Association) -> Iterator[Response]:
        yield Response(0)

    def store(self, message: Message, association: Association) -> Iterator[Response]:
        assert message.dataset is not None
        in_file = isinstance(message.dataset.content(), FileRange)
        self.stored.append((message.command["AffectedSOPInstanceUID"], message.dataset.tobytes(), in_file))
        yield Response(0)

    def many(self, message: Message, association: Association) -> Iterator[Response]:
        for number in range(1000):
            if association.cancelled(message):
                yield Response(0xFE00)
                return
            self.answered = number + 1
            yield Response(0xFF00, dataset=b"\0" * 64)
        yield Response(0)

    def flood(self, message: Message, association: Association) -> Iterator[Response]:
        for number in range(FLOOD):
            self.answered = number + 1
            yield Response(0xFF00, dataset=bytes(1024), more=True)
        yield Response(0)

    def asks(self, message: Message, association: Association) -> Iterator[Response]:
        association.ask(message.context, {"CommandField": 0x30, "AffectedSOPClassUID": VERIFICATION}, None)
        yield Response(0)

    def peer(self) -> RawPeer:
        return RawPeer.connect(self.server.port)

    def associated(self, **options: Any) -> RawPeer:
        peer = self.peer()
        peer.associate(**options)
        return peer


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.server.stop()
    made.server.drain(5)


@pytest.fixture
def bench_with(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(**dimse: Any) -> Bench:
        made.append(Bench(tmp_path, **dimse))
        return made[-1]

    yield make
    for each in made:
        each.server.stop()
        each.server.drain(5)


def test_echo_and_release(bench: Bench) -> None:
    peer = bench.associated()
    for message_id in (1, 2, 65535):
        peer.send(echo_rq(message_id))
        assert peer.response()["MessageIDBeingRespondedTo"] == message_id
    peer.release()


def test_what_is_negotiated(bench: Bench) -> None:
    window, identity = AsynchronousOperationsWindowNegotiation(), UserIdentityNegotiation()
    window.maximum_number_operations_invoked = window.maximum_number_operations_performed = 5
    identity.user_identity_type, identity.primary_field = 1, b"somebody"
    peer = bench.peer()
    printing = "1.2.840.10008.5.1.1.9"
    answer = peer.associate(associate_rq((VERIFICATION, printing, CT), ours=[window, identity])).to_primitive()
    results = {cx.context_id: cx.result for cx in answer.presentation_context_definition_results_list}
    assert results == {1: 0, 3: 3, 5: 0}
    assert answer.maximum_length_received == 16384
    assert not any(type(item) in (type(window), type(identity)) for item in answer.user_information)
    peer.release()


def test_who_asks_the_same_again_is_answered_the_same_and_nobody_else(bench: Bench) -> None:
    answers = []
    for classes, syntax in (
        ((VERIFICATION,), EXPLICIT),
        ((VERIFICATION, CT), EXPLICIT),
        ((VERIFICATION,), "1.2.3"),
    ) * 2:
        peer = bench.peer()
        peer.send(associate_rq(classes, syntax=syntax))
        answers.append(peer.receive())
        peer.close()
    assert answers[:3] == answers[3:]
    assert len(set(answers)) == 3


def test_agreements_are_not_collected_without_end() -> None:
    agreements = Agreements()
    for number in range(3 * MAX_KNOWN):
        proposal = read_request(memoryview(associate_rq(called=f"N{number}"))[6:])
        assert agreements.on(proposal, max_pdu=16384) is agreements.on(proposal, max_pdu=16384)
    assert len(agreements._known) <= MAX_KNOWN


@pytest.mark.parametrize("size", [0, 1, 2, 16370, 16371, 100_000, MEMORY, MEMORY + 1, 3 * MEMORY])
def test_a_data_set_arrives_byte_for_byte(bench: Bench, size: int) -> None:
    data = random.Random(size).randbytes(size)
    peer = bench.associated()
    for message_id in (1, 2):
        fragments = [data[at : at + 16370] for at in range(0, size, 16370)]
        assert peer.store("1.2.3", fragments, message_id=message_id) == 0
    peer.release()
    assert bench.stored == [("1.2.3", data, size > MEMORY)] * 2


def test_however_it_is_cut(bench: Bench) -> None:
    """Empty, odd and many values in a PDU, two messages in one, bytes of the stream in any pieces."""
    rng = random.Random(0)
    data = rng.randbytes(5001)
    command_set = store_rq("1.2.3")
    values = [pdv(3, 1, command_set[:7]), pdv(3, 1, b""), pdv(3, 3, command_set[7:])]
    values += [pdv(3, 0, data[:1]), pdv(3, 0, b""), pdv(3, 0, data[1:4000]), pdv(3, 2, data[4000:])]
    stream = b"".join(p_data(value) for value in values) + p_data(*values, *values)
    peer = bench.associated()
    at = 0
    while at < len(stream):
        step = rng.choice((1, 3, 100, 1500))
        peer.send(stream[at : at + step])
        at += step
    assert [peer.response()["Status"] for _ in range(3)] == [0, 0, 0]
    peer.release()
    assert bench.stored == [("1.2.3", data, False)] * 3


def test_tiny_fragments_cost_a_file_and_not_memory(bench: Bench) -> None:
    peer = bench.associated()
    data = bytes(range(250)) * 40
    tiny = b"".join(
        p_data(*(pdv(3, 0, data[at : at + 1]) for at in range(start, start + 1000))) for start in range(0, 10000, 1000)
    )
    peer.send(p_data(pdv(3, 3, store_rq("1.2"))) + tiny + p_data(pdv(3, 2, b"")))
    assert peer.response()["Status"] == 0
    assert bench.stored == [("1.2", data, True)]


def test_responses_are_cut_to_what_the_peer_takes(bench: Bench) -> None:
    peer = bench.associated(max_pdu=64)
    peer.send(echo_rq())
    control, answer = 0, b""
    while control != 3:
        kind, body = peer.receive() or (0, b"")
        assert kind == 4
        assert len(body) <= 64
        control = body[5]
        answer += body[6:]
    assert command.decode(answer)["Status"] == 0


def test_an_unknown_request_is_answered(bench: Bench) -> None:
    peer = bench.associated()
    fields = {"CommandField": 0x0140, "MessageID": 3, "CommandDataSetType": 0x0101}
    peer.send(p_data(pdv(1, 3, command.encode(fields))))
    response = peer.response()
    assert (response["CommandField"], response["MessageIDBeingRespondedTo"], response["Status"]) == (0x8140, 3, 0x0211)
    peer.release()


def many_rq(message_id: int = 5) -> bytes:
    fields = {"CommandField": MANY, "MessageID": message_id, "CommandDataSetType": 0x0101}
    return p_data(pdv(1, 3, command.encode(fields)))


def cancel_rq(message_id: int) -> bytes:
    fields = {"CommandField": 0x0FFF, "MessageIDBeingRespondedTo": message_id, "CommandDataSetType": 0x0101}
    return p_data(pdv(1, 3, command.encode(fields)))


def statuses(peer: RawPeer, count: int) -> list[int]:
    """Of the next `count` responses, data sets skipped."""
    found: list[int] = []
    while len(found) < count:
        answer = peer.receive()
        assert answer is not None and answer[0] == 4
        if answer[1][5] & 1:
            found.append(command.decode(answer[1][6:])["Status"])
    return found


def test_cancel(bench: Bench) -> None:
    peer = bench.associated()
    peer.send(many_rq() + cancel_rq(99) + cancel_rq(5))
    assert statuses(peer, 1) == [0xFE00]
    peer.send(many_rq())  # the C-CANCEL was for the one before
    assert statuses(peer, 1001) == [0xFF00] * 1000 + [0]
    peer.send(cancel_rq(5) + echo_rq())  # too late: not answered
    assert statuses(peer, 1) == [0]
    peer.release()


def test_what_is_at_hand_waits_for_who_reads_slowly(bench: Bench) -> None:
    """However much is at hand, a peer that does not read has the kernel's buffers full and HELD bytes more made."""
    peer = bench.associated()
    fields = {"CommandField": FLOODS, "MessageID": 5, "CommandDataSetType": 0x0101}
    peer.send(p_data(pdv(1, 3, command.encode(fields))))
    made, before = 0, -1
    while made != before or not made:
        before = made
        time.sleep(0.2)
        made = bench.answered
    buffers = sum(peer.sock.getsockopt(socket.SOL_SOCKET, which) for which in (socket.SO_RCVBUF, socket.SO_SNDBUF))
    assert made * 1024 < 2 * buffers + (8 << 20) < FLOOD * 1024
    assert statuses(peer, FLOOD + 1) == [0xFF00] * FLOOD + [0]
    peer.release()


def test_a_request_that_comes_while_another_is_answered_waits(bench: Bench) -> None:
    peer = bench.associated()
    peer.send(many_rq() + echo_rq(6) + echo_rq(7))
    assert statuses(peer, 1003) == [0xFF00] * 1000 + [0, 0, 0]
    peer.release()


def test_requests_without_end_instead_of_a_response_are_not_collected(bench: Bench) -> None:
    peer = bench.associated()
    fields = {"CommandField": ASKS, "MessageID": 5, "CommandDataSetType": 0x0101}
    peer.send(p_data(pdv(1, 3, command.encode(fields))))
    assert peer.response()["CommandField"] == 0x30
    peer.send(b"".join(echo_rq(number) for number in range(MAX_WAITING + 1)))
    assert peer.abort() == (protocol.PROVIDER, protocol.UNSPECIFIED)
    bench.associated().release()


@pytest.mark.parametrize("end", [pdu(0x05, bytes(4)), pdu(0x07, bytes(4)), b"", pdu(0x42, b"")])
def test_an_end_while_a_request_is_answered(bench: Bench, end: bytes) -> None:
    peer = bench.associated()
    peer.send(many_rq() + end)
    peer.sock.shutdown(socket.SHUT_WR)
    last = None
    while (answer := peer.receive()) is not None:
        last = answer
    assert bench.answered < 1000
    if end[:1] == b"\x42":
        assert last == (0x07, bytes((0, 0, protocol.PROVIDER, protocol.UNRECOGNIZED_PDU)))
    bench.associated().release()


TOO_LONG = 16384 + 1024 + 1
COMMAND = pdv(3, 3, store_rq("1.2"))
HOSTILE = {
    "unknown PDU type": (pdu(0x42, b""), (protocol.PROVIDER, protocol.UNRECOGNIZED_PDU)),
    "PDU type 0": (pdu(0x00, b""), (protocol.PROVIDER, protocol.UNRECOGNIZED_PDU)),
    "HTTP": (b"GET / HTTP/1.1\r\n\r\n", (protocol.PROVIDER, protocol.UNRECOGNIZED_PDU)),
    "a PDU of 4 GiB": (pdu(0x04, b"", length=0xFFFFFFFF), INVALID),
    "an A-ASSOCIATE-RQ of 4 GiB": (pdu(0x01, b"", length=0xFFFFFFFF), INVALID),
    "a PDU longer than announced": (pdu(0x04, b"", length=TOO_LONG), INVALID),
    "a P-DATA-TF of 0 bytes": (pdu(0x04, b""), INVALID),
    "a second A-ASSOCIATE-RQ": (associate_rq(), UNEXPECTED),
    "an A-ASSOCIATE-AC": (pdu(0x02, bytes(80)), UNEXPECTED),
    "an A-RELEASE-RP": (pdu(0x06, bytes(4)), UNEXPECTED),
    "a value cut off": (p_data(b"\0\0\0"), INVALID),
    "a value that overruns by one": (p_data(pdv(3, 3, b"ab", length=5)), INVALID),
    "a value that overruns by 4 GiB": (p_data(pdv(3, 3, b"ab", length=0xFFFFFFFF)), INVALID),
    "a value of length 0": (p_data(pdv(3, 3, b"", length=0)), INVALID),
    "a value of length 1": (p_data(pdv(3, 3, b"", length=1)), INVALID),
    "an unknown context": (p_data(pdv(77, 3, store_rq("1.2"))), INVALID),
    "context 0": (p_data(pdv(0, 3, store_rq("1.2"))), INVALID),
    "a data set without command": (p_data(pdv(3, 2, b"ab")), OUT_OF_ORDER),
    "a second command": (p_data(COMMAND, COMMAND), OUT_OF_ORDER),
    "a data set in another context": (p_data(COMMAND, pdv(1, 2, b"ab")), OUT_OF_ORDER),
    "a command in two contexts": (p_data(pdv(3, 1, b"ab"), pdv(1, 3, b"ab")), OUT_OF_ORDER),
    "a command without end": (p_data(pdv(3, 1, bytes(16000))) * (MAX_COMMAND // 16000 + 1), INVALID),
    "a command that is none": (p_data(pdv(3, 3, b"\xff" * 40)), INVALID),
    "an empty command": (p_data(pdv(3, 3, b"")), INVALID),
    "a response to nothing": (
        p_data(pdv(1, 3, command.encode({"CommandField": 0x8030, "CommandDataSetType": 0x0101, "Status": 0}))),
        OUT_OF_ORDER,
    ),
    "a request without id": (
        p_data(pdv(1, 3, command.encode({"CommandField": 0x30, "CommandDataSetType": 0x0101}))),
        OUT_OF_ORDER,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_bytes_abort_that_association_alone(bench: Bench, case: str, caplog: pytest.LogCaptureFixture) -> None:
    data, expected = HOSTILE[case]
    other, peer = bench.associated(), bench.associated()
    with caplog.at_level(logging.WARNING, "sphere"):
        peer.send(data)
        assert peer.abort() == expected
        peer.close()
        other.send(echo_rq())
        assert other.response()["Status"] == 0
        other.release()
        bench.server.drain(5)
    assert len([record for record in caplog.records if "aborted" in record.getMessage()]) == 1
    assert bench.stored == []


def item(kind: int, value: bytes, *, length: int | None = None) -> bytes:
    return struct.pack(">BxH", kind, len(value) if length is None else length) + value


def fixed(*, version: int = 1, calling: str = "RAW") -> bytes:
    """The begin of an A-ASSOCIATE-RQ body (PS3.8 Table 9-11)."""
    return struct.pack(">HH16s16s32x", version, 0, b"SPHERE".ljust(16), calling.encode().ljust(16))


FIXED = fixed()
APPLICATION = item(0x10, b"1.2.840.10008.3.1.1.1")
CONTEXT = item(0x20, b"\x01\0\0\0" + item(0x30, VERIFICATION.encode()) + item(0x40, b"1.2.840.10008.1.2"))


def context(number: int) -> bytes:
    return item(0x20, bytes((number, 0, 0, 0)) + item(0x30, b"1.2") + item(0x40, b"1.2"))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        FIXED[:-1],
        FIXED + b"\x10",
        FIXED + item(0x10, b"1.2", length=4),
        FIXED + APPLICATION + item(0x20, b"\x01\0\0\0" + item(0x30, b"1.2", length=9000)),
        FIXED + APPLICATION + item(0x77, b"abc"),
        FIXED + APPLICATION + context(2),
        FIXED + APPLICATION + context(1) * 2,
        FIXED + APPLICATION + context(1) * 129,
        FIXED + APPLICATION + context(1) * 50_000,
        FIXED + APPLICATION + item(0x20, b"\x01\0\0\0" + item(0x30, b"1.2") + item(0x40, b"") * 10_000),
        FIXED + APPLICATION + CONTEXT + item(0x50, item(0x51, b"abcd") * 8000),
        FIXED + APPLICATION + CONTEXT + item(0x50, item(0x51, b"abc")),
        fixed(calling="") + APPLICATION + CONTEXT,
        b"\xff" * 1000,
    ],
    ids=range(15),
)
def test_an_association_request_that_is_none(bench: Bench, body: bytes) -> None:
    peer = bench.peer()
    peer.send(pdu(0x01, body))
    assert peer.abort() == (protocol.USER, protocol.UNSPECIFIED)
    bench.associated().release()


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        (fixed(version=2) + APPLICATION + CONTEXT, (1, 2, 2)),
        (FIXED + item(0x10, b"1.2.3") + CONTEXT, (1, 1, 2)),
        (FIXED + CONTEXT, (1, 1, 2)),
        (fixed(calling="WHO") + APPLICATION + CONTEXT, (1, 1, 3)),
    ],
)
def test_rejections(bench: Bench, body: bytes, answer: tuple[int, int, int]) -> None:
    peer = bench.peer()
    peer.send(pdu(0x01, body))
    assert peer.receive() == (0x03, bytes((0, *answer)))
    assert peer.receive() is None


def test_more_associations_than_allowed(bench_with: Callable[..., Bench]) -> None:
    bench = bench_with(max_associations=2)
    first, _ = bench.associated(), bench.associated()
    third = bench.peer()
    third.send(associate_rq())
    assert third.receive() == (0x03, bytes((0, *protocol.LOCAL_LIMIT_EXCEEDED)))
    assert third.receive() is None
    first.release()
    bench.server.drain(0)  # both threads have ended, or are told to
    assert bench.places._value == 2


def test_more_connections_than_are_listened_to(bench_with: Callable[..., Bench]) -> None:
    bench = bench_with(max_associations=1)
    silent = [bench.peer() for _ in range(4)]
    silent[0].associate()
    closed = bench.peer()
    closed.send(b"")
    assert closed.receive() is None
    silent[0].send(echo_rq())
    assert silent[0].response()["Status"] == 0


@pytest.mark.parametrize(
    ("limit", "before", "expected"),
    [
        ("artim_s", b"", None),
        ("artim_s", associate_rq()[:20], None),
        ("network_timeout_s", associate_rq(), SILENT),
        ("dimse_timeout_s", associate_rq() + echo_rq()[:5], SILENT),
        ("dimse_timeout_s", associate_rq() + p_data(COMMAND), SILENT),
    ],
)
def test_the_silent_are_aborted(
    bench_with: Callable[..., Bench], limit: str, before: bytes, expected: tuple[int, int] | None
) -> None:
    peer = bench_with(**{limit: 0.3}).peer()
    peer.send(before)
    if len(before) > 100:
        assert (peer.receive() or (0,))[0] == 0x02
    assert peer.abort() == expected


def test_drip_feeding_does_not_help(bench_with: Callable[..., Bench]) -> None:
    bench = bench_with(dimse_timeout_s=0.3)
    peer = bench.associated()
    stop = threading.Event()

    def drip() -> None:
        for byte in p_data(pdv(3, 3, store_rq("1.2"))):
            if stop.wait(0.05):
                return
            try:
                peer.send(bytes((byte,)))
            except OSError:
                return

    thread = threading.Thread(target=drip)
    thread.start()
    assert peer.abort() == SILENT
    stop.set()
    thread.join()


def test_a_peer_that_does_not_read_costs_a_thread_for_a_while_and_nothing_else(
    bench_with: Callable[..., Bench],
) -> None:
    bench = bench_with(dimse_timeout_s=0.5)
    peer = bench.associated()
    peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    for message_id in range(200):
        peer.send(many_rq(message_id + 1))
    bench.associated().release()
    bench.server.drain(10)
    assert bench.answered > 0


def test_random_bytes_never_do_more_than_abort(bench: Bench) -> None:
    rng = random.Random(7)
    good = associate_rq() + p_data(COMMAND) + p_data(pdv(3, 2, b"abcd")) + echo_rq()
    for _ in range(150):
        data = bytearray(good)
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        peer = bench.peer()
        peer.send(bytes(data[: rng.randint(1, len(data))]))
        peer.sock.shutdown(socket.SHUT_WR)
        while peer.receive() is not None:
            pass
        peer.close()
    peer = bench.associated()
    peer.send(echo_rq())
    assert peer.receive() is not None
    peer.release()


def test_a_defect_of_a_service_ends_that_association_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: Any, value: Any) -> Any:
        raise RuntimeError("defect")

    other = bench.associated()
    monkeypatch.setattr(bench, "stored", type("Full", (), {"append": fail})())
    peer = bench.associated()
    peer.send(p_data(COMMAND) + p_data(pdv(3, 2, b"ab")))
    assert peer.abort() == (protocol.USER, protocol.UNSPECIFIED)
    other.release()


def test_stop_ends_idle_associations_at_last(bench: Bench) -> None:
    peer = bench.associated()
    bench.server.stop()
    bench.server.drain(0.1)
    assert peer.abort() == SILENT
    with pytest.raises(OSError, match="refused"):
        bench.peer()
