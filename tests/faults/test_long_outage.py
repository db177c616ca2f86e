"""An outage of an hour, by a clock that is told the time, and one that is longer than HDFS remembers who writes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from sphere.conf import serving
from sphere.conf.errors import StorageError
from sphere.conf.loading import from_dict
from sphere.conf.settings import Settings
from sphere.ingest import shipping
from sphere.ingest.records import MemberRecord
from sphere.ingest.shipping import RETRY_S, run_shipper
from sphere.ingest.spool import backlog, open_writer, spool_storage
from sphere.ingest.storage import open_storage
from tests.support.bundles import Failing, all_records, assert_sound, new_member
from tests.support.hdfs import HdfsCluster, hdfs_for_test
from tests.support.relay import Relay

HOUR_S = 3600.0


def archive(folder: Path, root: str) -> Settings:
    """One that spools."""
    sections: dict[str, Any] = {"storage": {"root": root}, "ingest": {"durability": "spool"}, "extract": {"every_s": 0}}
    return from_dict(sections, base=folder)


def land(settings: Settings, numbers: range) -> list[MemberRecord]:
    """Store members in a sealed bundle of the spool, as a receiver does."""
    with closing(open_writer(settings)) as writer:
        return [writer.store(new_member(number)) for number in numbers]


def assert_all_shipped(settings: Settings, records: list[MemberRecord]) -> None:
    """Each record once on the storage, with the bytes that it should have, and nothing in the spool."""
    storage = open_storage(settings.storage.root)
    assert_sound(storage)
    assert sorted(all_records(storage), key=repr) == sorted(records, key=repr)
    assert list(spool_storage(settings).walk("bundles")) == []
    assert backlog(settings).bundles == 0


class Pauses(threading.Event):
    """The shipper's: a pause takes no time, and `clock` goes on by it; `meanwhile` is called in each."""

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        super().__init__()
        self.clock = self.began = time.monotonic()
        self.taken: list[float] = []
        self._meanwhile = meanwhile

    @property
    def passed_s(self) -> float:
        return self.clock - self.began

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.taken.append(timeout)
        self.clock += timeout
        self._meanwhile()
        return self.is_set()


@pytest.mark.unit
def test_an_hour_without_the_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every instance is taken, the attempts come every 30 s and hold nothing open, and the backlog drains by itself."""
    settings, process = archive(tmp_path, "file:storage"), psutil.Process()
    records: list[MemberRecord] = []
    held: list[tuple[int, int]] = []
    since: list[str] = []

    def meanwhile() -> None:
        state = serving.read_spool(settings.archive.state_dir)
        assert state is not None
        if pauses.passed_s > HOUR_S and not state.error and not state.bundles:
            pauses.set()
        elif pauses.passed_s < HOUR_S and len(pauses.taken) % 3 == 0:
            records.extend(land(settings, range(len(records), len(records) + 3)))
        if state.error:
            since.append(state.failing_since)
            held.append((process.num_fds(), process.num_threads()))

    def away(call: str, path: str) -> None:
        if pauses.passed_s < HOUR_S:
            raise StorageError("the NameNode does not answer")

    pauses = Pauses(meanwhile)
    monkeypatch.setattr(shipping, "time", SimpleNamespace(monotonic=lambda: pauses.clock))
    failing = Failing(open_storage(settings.storage.root), away)  # type: ignore[abstract]  # it has every method
    monkeypatch.setattr(shipping, "open_storage", lambda *_, **__: failing)
    records += land(settings, range(3))
    run_shipper(settings, pauses)
    failed = len(since)
    assert pauses.taken[:6] == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0] and max(pauses.taken) == RETRY_S[1]
    assert failed == 124 and set(since) == {since[0]}  # 31 s for five of them, then each 30 s
    assert max(held[3:]) == held[3]  # descriptors and threads
    assert pauses.passed_s < HOUR_S + RETRY_S[1] + 5
    assert len(records) > 100
    assert_all_shipped(settings, records)


@pytest.fixture
def forgetful_hdfs_cluster(tmp_path: Path) -> Iterator[HdfsCluster]:
    """One that takes a file from who has not been heard of for 10 s: by HDFS's own defaults, for 20 minutes."""
    with hdfs_for_test(tmp_path / "hdfs", lease_s=10) as cluster:
        yield cluster


@pytest.mark.faults
@pytest.mark.hdfs
def test_the_namenode_forgets_who_wrote(forgetful_hdfs_cluster: HdfsCluster, tmp_path: Path) -> None:
    """The way to it is cut while a bundle is copied, until it has closed that file itself: the copy begins anew, and
    what waits drains, each once."""
    relay = Relay()
    relay.join(forgetful_hdfs_cluster.rpc_port)
    settings = archive(tmp_path, f"hdfs://127.0.0.1:{relay.port}/faults/hour")
    records = [record for number in range(0, 18, 3) for record in land(settings, range(number, number + 3))]
    held, go, stop, copies = threading.Event(), threading.Event(), threading.Event(), 0

    def on_step(name: str) -> None:
        nonlocal copies
        copies += name == "copying"
        if name == "copying" and copies == 3:
            held.set()
            go.wait(90)

    thread = threading.Thread(target=run_shipper, args=(settings, stop), kwargs={"on_step": on_step})
    thread.start()
    try:
        assert held.wait(60)
        _wait(lambda: forgetful_hdfs_cluster.open_files() == 1)
        relay.cut()
        _wait(lambda: forgetful_hdfs_cluster.open_files() == 0)
        records += [record for number in range(18, 30, 3) for record in land(settings, range(number, number + 3))]
        go.set()
        _wait(lambda: bool((state := serving.read_spool(settings.archive.state_dir)) and state.error))
        assert backlog(settings).bundles == 8  # two were shipped before
        relay.join()
        _wait(lambda: backlog(settings).bundles == 0)
    finally:
        go.set()
        stop.set()
        thread.join(60)
    assert copies == 11  # one of the ten twice
    assert_all_shipped(settings, records)
    relay.cut()


def _wait(until: Callable[[], bool], *, within_s: float = 60) -> None:
    deadline = time.monotonic() + within_s
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.1)
