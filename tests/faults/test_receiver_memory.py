"""The memory of a receiver stays flat: whatever the number, the size and the simultaneity of instances."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
from pydicom.uid import UID
from pynetdicom.dsutils import decode

from sphere.scp.commitment.information import write_information
from sphere.scp.commitment.report import WELL_KNOWN
from sphere.scp.commitment.transactions import Reference
from sphere.scp.contexts import STORAGE_COMMITMENT
from sphere.scp.upper.command import N_ACTION_RQ, NO_DATA_SET, RESPONSE, encode
from sphere.scp.upper.connection import CONTROL_PDU
from tests.support.memory import peak
from tests.support.raw_peer import (
    ABORTED,
    CT,
    EXPLICIT,
    RawPeer,
    associate_rq,
    identifying,
    p_data,
    pdu,
    pdv,
    store_rq,
)
from tests.support.receiver import Receiver, running_receiver

pytestmark = pytest.mark.faults

MIB = 1 << 20
RESIDENT = 150_000_000  # bytes that a receiver may have; one that answers queries has DuckDB's as well
PDV = 131072 - 6  # bytes of a fragment in a P-DATA-TF PDU of the length that we announce


@pytest.fixture(scope="module")
def receiver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    with running_receiver(tmp_path_factory.mktemp("archive")) as running:
        send(running, 100, 40_000)
        yield running


def fragments(uid: str, size: int) -> Iterator[bytes]:
    """An instance of `size` bytes, nearly all zeros, never all of it at once."""
    whole, first = bytes(PDV), identifying(uid)
    yield first
    size -= len(first)
    for _ in range(size // PDV):
        yield whole
    yield whole[: size % PDV]


def send(receiver: Receiver, count: int, size: int) -> None:
    """`count` instances of `size` bytes on one association."""
    peer = RawPeer.connect(receiver.port, timeout=120)
    peer.associate()
    for number in range(count):
        uid = f"1.2.{number}"
        assert peer.store(uid, fragments(uid, size), message_id=number + 1) == 0
    peer.release()


def test_any_number_of_instances(receiver: Receiver) -> None:
    before = peak(receiver.process.pid, forget=True)
    send(receiver, 2000, 40_000)
    assert peak(receiver.process.pid) - before < 4 * MIB
    assert peak(receiver.process.pid) < RESIDENT


def test_one_instance_of_600_mb(receiver: Receiver) -> None:
    size = 600 * MIB + 1
    before = peak(receiver.process.pid, forget=True)
    send(receiver, 1, size)
    assert peak(receiver.process.pid) - before < 24 * MIB
    assert peak(receiver.process.pid) < RESIDENT
    record = receiver.members()[-1]
    assert record.length - record.dataset_offset == size
    digest = hashlib.sha256()
    for fragment in fragments(record.SOPInstanceUID, size):
        digest.update(fragment)
    assert record.sha256 == digest.hexdigest()


def test_many_large_instances_at_once(receiver: Receiver) -> None:
    """16 associations with 7 MiB each, all of them held before their last byte: more than the budget for memory."""
    before = peak(receiver.process.pid, forget=True)
    nearly, gate = threading.Barrier(17, timeout=120), threading.Barrier(17, timeout=120)

    def one() -> Iterator[bytes]:
        yield from fragments("1.2.3", 7 * MIB)
        nearly.wait()
        gate.wait()
        yield b"\0\0"
        yield b"\0\0"

    statuses: list[int] = []

    def run() -> None:
        peer = RawPeer.connect(receiver.port, timeout=120)
        peer.associate()
        statuses.append(peer.store("1.2.3", one()))
        peer.release()

    threads = [threading.Thread(target=run) for _ in range(16)]
    for thread in threads:
        thread.start()
    nearly.wait()
    held = peak(receiver.process.pid)
    gate.wait()
    for thread in threads:
        thread.join()
    assert held - before < (16 + 16 + 16) * MIB  # a first buffer each, the budget, and room for the rest
    assert statuses == [0] * 16


def test_long_uids_in_commands_are_not_kept(receiver: Receiver) -> None:
    """Each response repeats the SOP class of its request, which may be 60 kB long and another one each time."""
    before = peak(receiver.process.pid, forget=True)
    peer = RawPeer.connect(receiver.port, timeout=120)
    peer.associate(max_pdu=PDV + 6)
    for number in range(300):
        sop_class = f"1.2.{number}." + "1" * 60_000
        peer.send(p_data(pdv(3, 3, store_rq("1.2.3", sop_class=sop_class))) + p_data(pdv(3, 2, b"\0\0")))
        answer = peer.receive()
        assert answer is not None and answer[0] == 0x04
    peer.release()
    assert peak(receiver.process.pid) - before < 4 * MIB  # 60 kB of each were kept: 18 MB


def test_storage_commitment_of_20_000_references(receiver: Receiver) -> None:
    """Whoever looks for where they are has an index, and is another process."""
    before = peak(receiver.process.pid, forget=True)
    stored = {record.SOPInstanceUID for record in receiver.members()}
    asked = [Reference(CT, f"1.2.{number}") for number in range(20_000)]
    peer = RawPeer.connect(receiver.port, timeout=120)
    peer.associate(associate_rq([STORAGE_COMMITMENT], syntax=EXPLICIT))
    request = {
        "RequestedSOPClassUID": STORAGE_COMMITMENT, "CommandField": N_ACTION_RQ, "MessageID": 1,
        "CommandDataSetType": 0, "RequestedSOPInstanceUID": WELL_KNOWN, "ActionTypeID": 1,
    }  # fmt: skip
    peer.send(p_data(pdv(1, 3, encode(request))))
    data = write_information("1.2.3.4", "", asked, [], UID(EXPLICIT))
    for at in range(0, len(data), PDV):
        peer.send(p_data(pdv(1, 2 if at + PDV >= len(data) else 0, data[at : at + PDV])))
    assert peer.response()["Status"] == 0
    event, report = peer.message()
    assert (event["EventTypeID"], event["AffectedSOPInstanceUID"]) == (2, WELL_KNOWN)  # some failed
    told = decode(BytesIO(report), False, True)
    assert {item.ReferencedSOPInstanceUID for item in told.ReferencedSOPSequence} == stored & {
        one.SOPInstanceUID for one in asked
    }
    assert len(told.ReferencedSOPSequence) + len(told.FailedSOPSequence) == len(asked)
    answer = {
        "AffectedSOPClassUID": STORAGE_COMMITMENT, "CommandField": event["CommandField"] | RESPONSE,
        "MessageIDBeingRespondedTo": event["MessageID"], "CommandDataSetType": NO_DATA_SET, "Status": 0,
    }  # fmt: skip
    peer.send(p_data(pdv(1, 3, encode(answer))))
    peer.release()
    assert peak(receiver.process.pid) - before < 45 * MIB
    assert peak(receiver.process.pid) < RESIDENT


def test_requests_of_256_connections_at_once(tmp_path: Path) -> None:
    """Nobody is known yet; what they send of an A-ASSOCIATE-RQ waits in the sockets until there is memory for it."""
    with running_receiver(tmp_path, {"dimse": {"artim_s": 120}}, clean=False) as running:
        peers = [RawPeer.connect(running.port, timeout=120) for _ in range(256)]
        for peer in peers:
            peer.send(pdu(1, b"A" * 100_000, length=CONTROL_PDU))
        answers: list[object] = []

        def finish(peer: RawPeer) -> None:
            peer.send(b"A" * (CONTROL_PDU - 100_000))
            answers.append(peer.receive())
            peer.close()

        threads = [threading.Thread(target=finish, args=(peer,)) for peer in peers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == [(ABORTED, bytes(4))] * 256  # by the user, no reason (PS3.8 AA-1)
        assert peak(running.process.pid) < RESIDENT


def test_64_associations_in_the_middle_of_a_data_set(tmp_path: Path) -> None:
    with running_receiver(tmp_path, clean=False) as running:
        peers = [RawPeer.connect(running.port, timeout=120) for _ in range(64)]
        for number, peer in enumerate(peers):
            peer.associate()
            peer.send(p_data(pdv(3, 3, store_rq(f"1.2.{number}"))))
            parts = list(fragments(f"1.2.{number}", 6 * MIB))
            for part in parts[:-1]:
                peer.send(p_data(pdv(3, 0, part)))
        assert peak(running.process.pid) < RESIDENT
        for number, peer in enumerate(peers):
            peer.send(p_data(pdv(3, 2, list(fragments(f"1.2.{number}", 6 * MIB))[-1])))
            assert peer.response()["Status"] == 0
            peer.release()
        assert peak(running.process.pid) < RESIDENT
        stored = {member.SOPInstanceUID: member.sha256 for member in running.members()}
    for number in range(64):
        expected = hashlib.sha256(b"".join(fragments(f"1.2.{number}", 6 * MIB))).hexdigest()
        assert stored[f"1.2.{number}"] == expected
