"""One SOPInstanceUID on many associations of two receivers, at the same moment and one after the other."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from sphere.ingest.journal import Landed
from sphere.ingest.storage import open_storage
from tests.support.raw_peer import RawPeer, identifying, p_data, pdv, store_rq
from tests.support.serving import running_supervisor

SUCCESS, DUPLICATE, WARNING = 0x0000, 0x0111, 0xB007
PEERS = 12


def dataset(uid: str, number: int) -> bytes:
    """That of an instance; numbers give different bytes."""
    return identifying(uid) + bytes([number, number]) * 50


def at_once(
    peers: list[RawPeer], uid: str, number_of: Callable[[int], int], *, commanded: Callable[[int], str] | None = None
) -> Counter[int]:
    """Statuses of C-STOREs whose last bytes are sent at the same moment; `commanded` gives their commands' UIDs."""
    gate = threading.Barrier(len(peers))
    statuses: list[int] = []

    def run(number: int, peer: RawPeer) -> None:
        peer.send(p_data(pdv(3, 3, store_rq(commanded(number) if commanded else uid, message_id=60))))
        gate.wait()
        peer.send(p_data(pdv(3, 2, dataset(uid, number_of(number)))))
        statuses.append(peer.response()["Status"])

    threads = [threading.Thread(target=run, args=one) for one in enumerate(peers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return Counter(statuses)


def in_turn(peers: list[RawPeer], uid: str, number_of: Callable[[int], int]) -> Counter[int]:
    """Statuses of C-STOREs one after the other."""
    return Counter(
        peer.store(uid, [dataset(uid, number_of(number))], message_id=50) for number, peer in enumerate(peers)
    )


@pytest.mark.timeout(300)
@pytest.mark.parametrize("policy", ["keep-first", "replace", "reject"])
def test_it_is_stored_once_and_other_bytes_as_the_policy_says(tmp_path: Path, policy: str) -> None:
    """Associations that were open before: 12, over two receivers, which the kernel spreads."""
    others = {SUCCESS: 1, DUPLICATE: PEERS - 1} if policy == "reject" else {SUCCESS: PEERS}
    warned = {WARNING if status == SUCCESS else status: count for status, count in others.items()}
    with running_supervisor(tmp_path, workers=2, ingest={"on_conflict": policy}) as serving:
        peers = []
        for number in range(PEERS):
            peers.append(RawPeer.connect(serving.port, timeout=60))
            peers[-1].associate()
            peers[-1].store(f"1.2.7.{number}", [dataset(f"1.2.7.{number}", 1)])
        assert in_turn(peers, "1.2.8.1", lambda number: 1) == {SUCCESS: PEERS}
        assert in_turn(peers, "1.2.8.2", lambda number: number) == others
        for turn in range(10):
            assert at_once(peers, f"1.2.8.3.{turn}", lambda number: 1) == {SUCCESS: PEERS}
            assert at_once(peers, f"1.2.8.4.{turn}", lambda number: number) == others
            said = partial("1.2.6.{}.{}".format, turn)  # by each command another UID
            assert at_once(peers, f"1.2.8.5.{turn}", lambda number: 1, commanded=said) == {WARNING: PEERS}
            assert at_once(peers, f"1.2.8.6.{turn}", lambda number: number, commanded=said) == warned
        for peer in peers:
            with suppress(OSError):
                peer.release()
        state_dir, root = serving.settings.archive.state_dir, serving.settings.storage.root
        assert serving.stop() == 0
        landed = Landed(open_storage(root), state_dir)
        records = [record for one in landed.bundles() for record in landed.records(one.bundle)[0]]
    stored = Counter(record.SOPInstanceUID for record in records)
    receivers = {record.bundle.rpartition("Z-")[2].split("-")[-2] for record in records}
    assert len(receivers) == 2, "the kernel gave every association to one receiver"
    assert stored["1.2.8.1"] == 1 and stored["1.2.8.2"] == PEERS  # what is refused is kept: see decision 0012
    assert {stored[f"1.2.8.3.{turn}"] for turn in range(10)} == {1}
    assert {stored[f"1.2.8.4.{turn}"] for turn in range(10)} == {PEERS}
    assert {stored[f"1.2.8.5.{turn}"] for turn in range(10)} == {1}
    assert {stored[f"1.2.8.6.{turn}"] for turn in range(10)} == {PEERS}
    assert not [uid for uid in stored if uid.startswith("1.2.6.")]
    assert sum(stored.values()) == len({(record.SOPInstanceUID, record.sha256) for record in records})
