"""The upper layer over a real socket: what is hostile, silent or too much, and defects of our own."""

from __future__ import annotations

import logging
import random
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

import pytest

from sphere.scp.upper import command, protocol, transport
from sphere.scp.upper.messages import MAX_COMMAND
from tests.support.raw_peer import (
    VERIFICATION,
    RawPeer,
    associate_rq,
    echo_rq,
    p_data,
    pdu,
    pdv,
    store_rq,
)
from tests.support.upper import Bench, many_rq

pytestmark = pytest.mark.unit

INVALID = (protocol.PROVIDER, protocol.INVALID_PARAMETER)
UNEXPECTED = (protocol.PROVIDER, protocol.UNEXPECTED_PDU)
OUT_OF_ORDER = (protocol.PROVIDER, protocol.UNEXPECTED_PARAMETER)
SILENT = (protocol.PROVIDER, protocol.UNSPECIFIED)
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


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was aborted here waits for the other end, and has less time than elsewhere to be the first to close."""
    monkeypatch.setattr(transport, "GRACE_S", 0.1)


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


def fixed(*, version: int = 1, calling: str = "RAW", called: str = "SPHERE") -> bytes:
    """The begin of an A-ASSOCIATE-RQ body (PS3.8 Table 9-11)."""
    return struct.pack(">HH16s16s32x", version, 0, called.encode().ljust(16), calling.encode().ljust(16))


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
        FIXED + APPLICATION + context(2),
        FIXED + APPLICATION + context(1) * 2,
        FIXED + APPLICATION + context(1) * 129,
        FIXED + APPLICATION + context(1) * 50_000,
        FIXED + APPLICATION + item(0x20, b"\x01\0\0\0" + item(0x30, b"1.2") + item(0x40, b"") * 10_000),
        FIXED + APPLICATION + CONTEXT + item(0x50, item(0x51, b"abcd") * 8000),
        FIXED + APPLICATION + CONTEXT + item(0x50, item(0x51, b"abc")),
        b"\xff" * 1000,
    ],
    ids=range(13),
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
        (fixed(calling="") + APPLICATION + CONTEXT, (1, 1, 3)),
        (fixed(called="") + APPLICATION + CONTEXT, (1, 1, 7)),
    ],
)
def test_rejections(bench: Bench, body: bytes, answer: tuple[int, int, int]) -> None:
    peer = bench.peer()
    peer.send(pdu(0x01, body))
    assert peer.receive() == (0x03, bytes((0, *answer)))
    assert peer.receive() is None


IDENTITY = b"\x06\0\0\4abcd\0\0"  # of a type that there is not (PS3.7 D.3.3.7)


@pytest.mark.parametrize(
    "body",
    [
        FIXED + item(0x77, b"abc") + APPLICATION + CONTEXT + item(0x60, b""),
        FIXED + APPLICATION + CONTEXT[:2] + struct.pack(">H", len(CONTEXT)) + CONTEXT[4:] + item(0x99, b""),
        *(FIXED + APPLICATION + CONTEXT + item(0x50, item(kind, b"abcd")) for kind in (0x50, 0x5A, 0x60, 0xFF)),
        FIXED + APPLICATION + CONTEXT + item(0x50, item(0x58, IDENTITY)),
    ],
    ids=["items", "of a context", "0x50", "0x5A", "0x60", "0xFF", "identity"],
)
def test_what_nobody_knows_is_ignored(bench: Bench, body: bytes) -> None:
    """PS3.8 9.3.1."""
    peer = bench.peer()
    answer = peer.associate(pdu(0x01, body)).to_primitive()
    assert [cx.result for cx in answer.presentation_context_definition_results_list] == [0]
    peer.release()


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


def test_one_address_that_says_nothing_leaves_room_for_others(bench_with: Callable[..., Bench]) -> None:
    bench = bench_with(max_associations=4)
    silent = [bench.peer() for _ in range(20)]
    assert silent[-1].receive() is None
    sock = socket.create_connection(("127.0.0.1", bench.server.port), timeout=30, source_address=("127.0.0.2", 0))
    other = RawPeer(sock)
    other.associate()
    other.send(echo_rq())
    assert other.response()["Status"] == 0
    other.release()
    silent[0].associate()  # what was accepted is served


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
