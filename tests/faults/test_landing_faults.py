"""Disks that fail and senders that misbehave while others store: every acknowledged instance is there once, whole."""

from __future__ import annotations

import resource
import socket
import struct
import time
from collections import Counter
from pathlib import Path

import pytest

from sphere.scp.store import OUT_OF_RESOURCES
from tests.support.faulty_receiver import FAULT, HALVES
from tests.support.ledger import PIECE, Ledger, Senders, audit, begin, store
from tests.support.raw_peer import ABORTED, RawPeer, associate_rq, p_data, pdu, pdv, store_rq
from tests.support.receiver import Receiver, running_receiver

pytestmark = pytest.mark.faults

MANY = 1000


@pytest.mark.parametrize("fault", ["write ENOSPC", "write EIO", "fsync EIO"])
def test_a_disk_that_fails_for_a_while(tmp_path: Path, fault: str) -> None:
    ledger = Ledger()
    with running_receiver(tmp_path, module="tests.support.faulty_receiver") as receiver:
        with Senders(ledger, receiver.port, count=4):
            ledger.wait_for_success(time.monotonic())
            (tmp_path / FAULT).write_text(fault)
            deadline = time.monotonic() + 20
            while ledger.refused[OUT_OF_RESOURCES] < 50:
                assert time.monotonic() < deadline, ledger.refused
                time.sleep(0.01)
            (tmp_path / FAULT).unlink()
            ledger.wait_for_success(time.monotonic())
        assert set(ledger.refused) == {OUT_OF_RESOURCES}
        assert ledger.broken == 0
    assert (tmp_path / HALVES).exists() == fault.startswith("write")
    result = audit(ledger, receiver.settings)
    assert result.unacknowledged == 0


def test_descriptors_run_out(tmp_path: Path) -> None:
    """At any of the places where landing needs one: for a bundle, its journal, a lock, a waiting file, a connection."""
    ledger = Ledger()
    with running_receiver(tmp_path, {"storage": {"seal_mib": 1, "memory_mib": 1}}) as receiver:
        pid = receiver.process.pid
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        with Senders(ledger, receiver.port, count=4, largest=2_500_000):
            ledger.wait_for_count(10)
            used = len(list(Path(f"/proc/{pid}/fd").iterdir()))
            for room in range(6, -7, -2):
                resource.prlimit(pid, resource.RLIMIT_NOFILE, (max(8, used + room), limits[1]))
                time.sleep(0.4)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
            ledger.wait_for_success(time.monotonic())
        assert set(ledger.refused) == {OUT_OF_RESOURCES}
        assert "Traceback" not in receiver.log
    assert audit(ledger, receiver.settings).unacknowledged == 0


@pytest.mark.parametrize("way", ["dies", "aborts", "is slow"])
def test_a_sender_in_the_middle_of_a_data_set(tmp_path: Path, way: str) -> None:
    ledger = Ledger()
    limits = {"artim_s": 1.0, "network_timeout_s": 1.5, "dimse_timeout_s": 1.0}
    with running_receiver(tmp_path, {"dimse": limits}) as receiver:
        with Senders(ledger, receiver.port, count=2):
            uids = [_half_sent(receiver, ledger, way) for _ in range(5)]
            ledger.wait_for_success(time.monotonic())
        assert ledger.broken == 0
    result = audit(ledger, receiver.settings)
    assert result.unacknowledged == 0
    assert not set(uids) & {record.SOPInstanceUID for record in receiver.members()}


def _half_sent(receiver: Receiver, ledger: Ledger, way: str) -> str:
    """Send one instance whole and half of another, then do what `way` says; the UID of the second."""
    peer = RawPeer.connect(receiver.port)
    begin(peer)
    assert store(peer, ledger, *ledger.instance()) == 0
    uid, data = ledger.instance()
    peer.send(p_data(pdv(3, 3, store_rq(uid, message_id=2))))
    peer.send(p_data(pdv(3, 0, data[: min(PIECE, len(data) // 2)])))
    if way == "dies":
        peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
    elif way == "aborts":
        peer.send(pdu(ABORTED, bytes(4)))
    else:
        assert peer.abort() is not None  # told by the receiver, who has waited long enough
    peer.close()
    return uid


@pytest.mark.parametrize("places", [MANY, 64])
def test_a_thousand_associations_at_once(tmp_path: Path, places: int) -> None:
    """All are served where there is room for them; otherwise each is told or closed, and the port goes on."""
    ledger = Ledger()
    with running_receiver(tmp_path, {"dimse": {"max_associations": places}}) as receiver:
        peers = []
        for _ in range(MANY):
            peers.append(RawPeer.connect(receiver.port, timeout=60))
            peers[-1].send(associate_rq())
        ends: Counter[str] = Counter()
        accepted = []
        for peer in peers:
            try:
                answer = peer.receive()
            except ConnectionResetError:
                answer = None
            kind = {0x02: "accepted", 0x03: "rejected"}[answer[0]] if answer else "closed"
            ends[kind] += 1
            accepted += [peer] * (kind == "accepted")
        for peer in accepted:
            assert store(peer, ledger, *ledger.instance(largest=20_000)) == 0
        assert ends["accepted"] == places, ends
        assert sum(ends.values()) == MANY
        for peer in peers:
            peer.close()
        with Senders(ledger, receiver.port, count=1):
            ledger.wait_for_success(time.monotonic())
    assert audit(ledger, receiver.settings).acknowledged > places
