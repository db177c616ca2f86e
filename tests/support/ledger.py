"""Senders that keep books, and the audit of an archive against them: nothing lost, nothing twice, nothing half."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from sphere.conf.settings import Settings
from sphere.ingest.journal import Landed
from sphere.ingest.recovery import recover
from sphere.ingest.storage import open_storage
from sphere.scp.upper import command
from tests.support.bundles import assert_sound
from tests.support.raw_peer import RawPeer, associate_rq, identifying, p_data, pdv, store_rq

PIECE = 16_000  # bytes of data set in one PDU
RECOVER_S = 30.0  # seconds for recovery, which is repeated while it fails
RESUME_S = 10.0  # seconds within which service has to resume by itself


@dataclass
class Ledger:
    """What was sent and what was acknowledged, by SOP Instance UID; sha256 of the data sets."""

    root: str = "1.2.826.0.1.7"
    sent: dict[str, str] = field(default_factory=dict)
    acknowledged: dict[str, float] = field(default_factory=dict)  # monotonic time of Success
    refused: Counter[int] = field(default_factory=Counter)  # by status
    broken: int = 0  # associations that ended otherwise than by our release
    slowest: float = 0.0  # seconds that an answer took at most
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def instance(self, *, largest: int = 60_000) -> tuple[str, bytes]:
        """A UID never used before and a data set of its own."""
        with self._lock:
            uid = f"{self.root}.{len(self.sent) + 1}"
            self.sent[uid] = ""
        data = identifying(uid) + random.Random(uid).randbytes(random.Random(uid).randrange(largest))
        self.sent[uid] = hashlib.sha256(data).hexdigest()
        return uid, data

    def wait_for_count(self, more: int, *, within_s: float = 60) -> None:
        """Return when `more` further instances were acknowledged; fails after `within_s` seconds."""
        wanted, deadline = len(self.acknowledged) + more, time.monotonic() + within_s
        while len(self.acknowledged) < wanted:
            assert time.monotonic() < deadline, f"{len(self.acknowledged)} of {wanted} acknowledged"
            time.sleep(0.02)

    def wait_for_success(self, since: float, *, within_s: float = RESUME_S) -> None:
        """Return when something was acknowledged after the monotonic time `since`; fails after `within_s` seconds."""
        while not any(at > since for at in list(self.acknowledged.values())[-50:]):
            assert time.monotonic() < since + within_s, f"no Success within {within_s} s"
            time.sleep(0.02)

    def longest_gap(self, since: float) -> float:
        """Seconds without any acknowledgement, at most, from the monotonic time `since` to the last one."""
        times = [since, *sorted(at for at in self.acknowledged.values() if at > since)]
        return max((later - earlier for earlier, later in itertools.pairwise(times)), default=math.inf)


class Senders:
    """Threads that store on associations of their own, each begun anew when it broke, until `stop`."""

    def __init__(self, ledger: Ledger, port: int, *, count: int = 4, largest: int = 60_000, pause_s: float = 0) -> None:
        self._ledger, self._port, self._largest, self._pause_s = ledger, port, largest, pause_s
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Senders:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._associate()
            except (OSError, EOFError):
                self._ledger.broken += 1
                time.sleep(0.05)

    def _associate(self) -> None:
        peer = RawPeer.connect(self._port, timeout=20)
        try:
            begin(peer)
            for number in range(50):
                if self._stop.is_set():
                    break
                uid, data = self._ledger.instance(largest=self._largest)
                store(peer, self._ledger, uid, data, message_id=number + 1)
                time.sleep(self._pause_s)
        finally:
            peer.close()


def begin(peer: RawPeer) -> None:
    """An association; raises EOFError when it is refused or cut."""
    peer.send(associate_rq())
    answer = peer.receive()
    if answer is None or answer[0] != 0x02:
        raise EOFError("no association")


def store(peer: RawPeer, ledger: Ledger, uid: str, data: bytes, *, message_id: int = 1) -> int:
    """C-STORE, booked; the status. Raises OSError or EOFError when there is no answer."""
    peer.send(p_data(pdv(3, 3, store_rq(uid, message_id=message_id))))
    for at in range(0, len(data), PIECE):
        peer.send(p_data(pdv(3, 2 if at + PIECE >= len(data) else 0, data[at : at + PIECE])))
    sent = time.monotonic()
    answer = peer.receive()
    ledger.slowest = max(ledger.slowest, time.monotonic() - sent)
    if answer is None or answer[0] != 0x04 or len(answer[1]) < 6:
        raise EOFError("no answer")
    status = int(command.decode(answer[1][6:])["Status"])
    if status == 0:
        ledger.acknowledged[uid] = time.monotonic()
    else:
        ledger.refused[status] += 1
    return status


@dataclass(frozen=True)
class Audit:
    """What an archive holds of a ledger."""

    acknowledged: int
    present: int  # of the acknowledged
    lost: int
    duplicated: int
    unacknowledged: int  # present, whole, and not acknowledged: the sender was cut off before its answer
    altered: int  # other bytes than were sent

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in vars(self).items())


def audit(ledger: Ledger, settings: Settings, *, say: Callable[[str], None] = print) -> Audit:
    """Recover, read everything back and compare; nothing may be lost, twice or altered."""
    storage = open_storage(settings.storage.root)
    deadline = time.monotonic() + RECOVER_S
    while (report := recover(storage, settings)).failed:  # HDFS may still offer a node that was killed
        assert time.monotonic() < deadline, report.failed
    landed = Landed(storage, settings.archive.state_dir)
    found: Counter[str] = Counter()
    altered = 0
    for state in landed.bundles():
        whole = storage.read(state.bundle)
        for record in landed.records(state.bundle)[0]:
            data = whole[record.offset + record.dataset_offset : record.offset + record.length]
            found[record.SOPInstanceUID] += 1
            altered += hashlib.sha256(data).hexdigest() != ledger.sent.get(record.SOPInstanceUID)
    result = Audit(
        acknowledged=len(ledger.acknowledged),
        present=sum(1 for uid in ledger.acknowledged if found[uid]),
        lost=sum(1 for uid in ledger.acknowledged if not found[uid]),
        duplicated=sum(1 for count in found.values() if count > 1),
        unacknowledged=sum(1 for uid in found if uid not in ledger.acknowledged),
        altered=altered,
    )
    say(f"\n{result} refused={sum(ledger.refused.values())} broken={ledger.broken} recovered={len(report.bundles)}")
    assert (result.lost, result.duplicated, result.altered) == (0, 0, 0), result
    assert_sound(storage)
    return result
