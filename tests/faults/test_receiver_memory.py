"""The memory of a receiver stays flat: whatever the number, the size and the simultaneity of instances."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator

import pytest

from tests.support.memory import peak
from tests.support.raw_peer import RawPeer, identifying
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
