"""The upper layer over a real socket, with services of the test: what is right."""

from __future__ import annotations

import random
import socket
import time

import pytest
from pynetdicom.pdu_primitives import AsynchronousOperationsWindowNegotiation, UserIdentityNegotiation

from sphere.scp.upper import command, protocol
from sphere.scp.upper.association import MAX_WAITING
from sphere.scp.upper.negotiation import MAX_KNOWN, Agreements, read_request
from sphere.scp.upper.transport import QUICKACK
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
from tests.support.upper import ASKS, FLOOD, FLOODS, MEMORY, Bench, many_rq

pytestmark = pytest.mark.unit


def test_echo_and_release(bench: Bench) -> None:
    peer = bench.associated()
    for message_id in (1, 2, 65535):
        peer.send(echo_rq(message_id))
        assert peer.response()["MessageIDBeingRespondedTo"] == message_id
    peer.release()


@pytest.mark.skipif(QUICKACK is None, reason="there is no TCP_QUICKACK but on Linux")
def test_a_sender_that_waits_for_acknowledgements_gets_them(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """One with Nagle's algorithm keeps a segment until the one before is acknowledged, 40 ms later by default: before
    each receive the kernel is asked to acknowledge at once. It takes that back by itself, so once is not enough."""
    asked: dict[int, bool] = {}
    receives: list[bool] = []
    setsockopt, recv_into = socket.socket.setsockopt, socket.socket.recv_into

    def noted_option(sock: socket.socket, level: int, option: int, value: int | bytes) -> None:
        if (level, option, value) == (socket.IPPROTO_TCP, QUICKACK, 1):
            asked[sock.fileno()] = True
        setsockopt(sock, level, option, value)

    def noted_receive(sock: socket.socket, *arguments: int) -> int:
        receives.append(asked.pop(sock.fileno(), False))
        return recv_into(sock, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "setsockopt", noted_option)
    monkeypatch.setattr(socket.socket, "recv_into", noted_receive)
    peer = bench.associated()
    for number in range(50):
        assert peer.store(f"1.2.{number}", [bytes(10_000)] * 4, message_id=number + 1) == 0
    peer.release()
    assert len(receives) > 50
    assert all(receives)


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
    bench.may_answer.clear()
    peer.send(many_rq() + end)
    peer.sock.shutdown(socket.SHUT_WR)
    bench.may_answer.set()
    last = None
    while (answer := peer.receive()) is not None:
        last = answer
    assert bench.answered < 1000
    if end[:1] == b"\x42":
        assert last == (0x07, bytes((0, 0, protocol.PROVIDER, protocol.UNRECOGNIZED_PDU)))
    bench.associated().release()
