"""Tombstones: what was deleted, told to every process at once; the latest of an instance counts."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from itertools import islice, permutations
from pathlib import Path

import orjson
import pytest

from sphere.catalog import lock, tombstones
from sphere.catalog.annotations import Target
from sphere.catalog.lock import FateLock
from sphere.catalog.tombstones import FOLDER, Tombstones, open_tombstones
from sphere.conf.errors import BytesGone, LockHeld, StorageError
from sphere.conf.settings import Settings
from sphere.ingest.storage import open_storage
from sphere.ingest.storage.base import Storage
from sphere.ingest.storage.local import LocalStorage
from tests.support.landing import archive

pytestmark = pytest.mark.unit


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return archive(tmp_path)


@pytest.fixture
def graves(settings: Settings) -> Iterator[Tombstones]:
    one = open_tombstones(settings)
    yield one
    one.close()


def named(*numbers: int, study: str = "1.2", series: str = "1.2.1") -> list[Target]:
    return [Target("IMAGE", study, series, f"9.{number}") for number in numbers]


def lines(settings: Settings) -> list[bytes]:
    root = Path(settings.archive.state_dir.parent, "storage", FOLDER)
    return [line for file in sorted(root.rglob("*.jsonl")) for line in file.read_bytes().splitlines()]


def test_nothing_is_opened_or_made_before_something_is_deleted(settings: Settings, graves: Tombstones) -> None:
    assert graves.deleted(["9.1"]) == set()
    assert graves.changes() == ([], "")
    assert (graves.count(), list(graves.find()), graves.told("t"), graves.state()) == (0, [], "", "")
    assert graves.restore(["9.1"], by="test") == 0
    assert not (settings.archive.state_dir / "events").exists()


def test_deleted_and_restored(graves: Tombstones) -> None:
    assert graves.delete(named(1, 2, 3), by="ann", reason="withdrawn") == 3
    assert graves.delete(named(3, 4), by="ben") == 1
    assert graves.deleted(["9.1", "9.4", "9.5"]) == {"9.1", "9.4"}
    assert graves.restore(["9.1", "9.4", "9.5"], by="cem") == 2
    assert graves.restore([], by="cem") == 0
    assert graves.deleted(["9.1", "9.2", "9.3", "9.4"]) == {"9.2", "9.3"}
    assert graves.count() == 2
    assert [(one.SOPInstanceUID, one.by, one.reason) for one in graves.find()] == [
        ("9.2", "ann", "withdrawn"),
        ("9.3", "ann", "withdrawn"),
    ]


def test_found_by_what_they_are_of(graves: Tombstones, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tombstones, "PAGE", 2)
    graves.delete([*named(1, 2, 3, 4), *named(5, series="1.2.2"), *named(6, study="7", series="7.1")], by="x")
    assert [one.SOPInstanceUID for one in graves.find(study=["1.2"])] == ["9.1", "9.2", "9.3", "9.4", "9.5"]
    assert [one.SOPInstanceUID for one in graves.find(study=["7"], series=["1.2.2"])] == []
    assert [one.SOPInstanceUID for one in graves.find(series=["1.2.2", "7.1"])] == ["9.5", "9.6"]
    assert [one.SOPInstanceUID for one in graves.find(sop=["9.6", "9.7"])] == ["9.6"]


def test_changes_from_a_cursor(graves: Tombstones, monkeypatch: pytest.MonkeyPatch) -> None:
    graves.delete(named(1, 2), by="x")
    first, cursor = graves.changes()
    assert [(one.SOPInstanceUID, one.deleted) for one in first] == [("9.1", True), ("9.2", True)]
    assert graves.changes(cursor) == ([], cursor)
    graves.restore(["9.2"], by="x")
    graves.delete(named(3), by="x")
    changed, _ = graves.changes(cursor)
    assert [(one.SOPInstanceUID, one.deleted) for one in changed] == [("9.2", False), ("9.3", True)]
    monkeypatch.setattr(tombstones, "PAGE", 2)
    assert [one.SOPInstanceUID for one in graves.changes()[0]] == ["9.1", "9.2"]


def test_a_cursor_of_another_cache_is_before_everything(settings: Settings, graves: Tombstones) -> None:
    graves.delete(named(1, 2), by="x")
    _, cursor = graves.changes()
    graves.tell("table", cursor)
    assert graves.told("table") == cursor
    graves.close()
    for path in (settings.archive.state_dir / "events").iterdir():
        path.unlink()
    again = open_tombstones(settings)
    changes, other = again.changes(cursor)
    assert [one.SOPInstanceUID for one in changes] == ["9.1", "9.2"]
    assert other != cursor
    assert again.told("table") == ""
    again.close()


def _other_process(settings: Settings) -> None:
    one = open_tombstones(settings)
    one.delete(named(1), by="other")
    one.close()


def test_told_to_other_processes(settings: Settings, graves: Tombstones) -> None:
    assert graves.deleted(["9.1"]) == set()
    process = multiprocessing.get_context("spawn").Process(target=_other_process, args=(settings,))
    process.start()
    process.join()
    assert graves.deleted(["9.1"]) == {"9.1"}


def test_applied_in_any_order(tmp_path: Path) -> None:
    settings = archive(tmp_path / "a")
    one = open_tombstones(settings)
    one.delete(named(1, 2), by="x")
    one.restore(["9.1"], by="x")
    one.delete(named(1), by="y")
    one.restore(["9.1", "9.2"], by="z")
    one.delete(named(2), by="z", reason="last")
    one.close()
    events = lines(settings)
    assert len(events) == 5
    for number, order in enumerate(islice(permutations(events), 0, None, 11)):
        other = archive(tmp_path / f"order{number}")
        storage = open_storage(other.storage.root)
        storage.write(f"{FOLDER}/2026/03/01/a.jsonl", b"\n".join([*order, order[0], b""]))
        graves = open_tombstones(other)
        assert [(found.SOPInstanceUID, found.reason) for found in graves.find()] == [("9.2", "last")]
        graves.close()


def now() -> datetime:
    return datetime.now(timezone.utc)


def test_what_is_erased_stays_deleted_for_good(graves: Tombstones, settings: Settings) -> None:
    graves.delete(named(1, 2, 3), by="ann", reason="withdrawn")
    before, state, cursor = list(graves.find()), graves.state(), graves.changes()[1]
    assert graves.erase(["9.1", "9.2", "9.7"], until=now()) == {"9.1", "9.2"}
    assert [(one.SOPInstanceUID, one.erased) for one in graves.find()] == [("9.1", True), ("9.2", True), ("9.3", False)]
    assert [replace(one, erased=False) for one in graves.find()] == before  # who deleted it, when and why
    assert (graves.count(), graves.state(), graves.changes(cursor)[0]) == (3, state, [])  # nobody looks anew
    assert graves.deleted(["9.1", "9.3"]) == {"9.1", "9.3"}
    assert graves.delete(named(1), by="ben") == 0
    other = open_tombstones(settings)
    for uids in (["9.1"], ["9.1", "9.3"]):
        with pytest.raises(BytesGone, match=r"the bytes of 1 of these instances are gone since compaction, as of 9\.1"):
            other.restore(uids, by="cem")
    assert other.count() == 3
    assert other.restore(["9.3"], by="cem") == 1
    assert other.erase(["9.1", "9.3"], until=now()) == {"9.1"}
    other.close()


def test_what_was_deleted_too_late_is_not_erased(graves: Tombstones) -> None:
    graves.delete(named(1), by="x")
    between = now()
    graves.delete(named(2), by="x")
    assert graves.erase(["9.1", "9.2"], until=between - timedelta(days=1)) == set()
    assert graves.erase(["9.1", "9.2"], until=between) == {"9.1"}
    assert graves.erase(["9.1", "9.2"], until=between) == {"9.1"}
    assert graves.restore(["9.2"], by="x") == 1


def test_erased_is_applied_in_any_order(tmp_path: Path) -> None:
    settings = archive(tmp_path / "a")
    one = open_tombstones(settings)
    one.delete(named(1, 2), by="x", reason="first")
    one.restore(["9.1"], by="x")
    one.delete(named(1), by="y", reason="last")
    one.erase(["9.1", "9.2"], until=now())
    one.close()
    events = lines(settings)
    assert len(events) == 5
    for number, order in enumerate(islice(permutations(events), 0, None, 11)):
        other = archive(tmp_path / f"order{number}")
        open_storage(other.storage.root).write(f"{FOLDER}/2026/03/01/a.jsonl", b"\n".join([*order, order[0], b""]))
        graves = open_tombstones(other)
        found = [(found.SOPInstanceUID, found.reason, found.erased) for found in graves.find()]
        assert found == [("9.1", "last", True), ("9.2", "first", True)]
        graves.close()


def test_undoing_and_erasing_take_turns(
    settings: Settings, graves: Tombstones, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "FATE_WAIT_S", 0.0)
    graves.delete(named(1), by="x")
    other = open_tombstones(settings)
    with FateLock(open_storage(settings.storage.root), job="compact"):
        with pytest.raises(LockHeld, match=r"the tombstones are being written by compact \(process \d+ on "):
            graves.restore(["9.1"], by="x")
        with pytest.raises(LockHeld, match="the tombstones are being written by compact"):
            graves.erase(["9.1"], until=now())
    assert graves.count() == 1
    assert other.restore(["9.1"], by="x") == 1
    assert graves.erase(["9.1"], until=now()) == set()
    other.close()


@pytest.mark.parametrize("round_", range(4))
def test_at_the_same_moment_one_of_them_wins(settings: Settings, round_: int) -> None:
    uids = [f"9.{number}" for number in range(20)]
    first, second = open_tombstones(settings), open_tombstones(settings)
    first.delete(named(*range(20)), by="x")
    erased: list[set[str]] = []
    thread = threading.Thread(target=lambda: erased.extend(second.erase([uid], until=now()) for uid in uids))
    thread.start()
    back = set()
    for uid in reversed(uids):
        with suppress(BytesGone):
            back |= {uid} if first.restore([uid], by="y") else set()
    thread.join()
    gone = set().union(*erased)
    assert gone | back == set(uids)
    assert not gone & back
    assert {one.SOPInstanceUID for one in second.find() if one.erased} == gone
    assert second.deleted(uids) == gone
    first.close()
    second.close()


def test_a_clock_that_is_behind_does_not_keep_a_deletion_alive(settings: Settings) -> None:
    event = {"id": "f" * 32, "action": "deleted", "at": "2999-01-01T00:00:00.000000+00:00", "by": "x", "reason": ""}
    event |= {"StudyInstanceUID": "1.2", "SeriesInstanceUID": "1.2.1", "SOPInstanceUIDs": ["9.1"]}
    open_storage(settings.storage.root).write(f"{FOLDER}/2026/03/01/a.jsonl", orjson.dumps(event) + b"\n")
    graves = open_tombstones(settings)
    assert graves.restore(["9.1"], by="y") == 1
    assert graves.deleted(["9.1"]) == set()
    graves.close()


def test_many_instances_are_several_events(settings: Settings, graves: Tombstones) -> None:
    assert graves.delete(named(*range(2500)), by="x") == 2500
    assert [len(orjson.loads(line)["SOPInstanceUIDs"]) for line in lines(settings)] == [1000, 1000, 500]
    assert graves.count() == 2500


class FarStorage:
    """A storage that is asked over a network, as far as anybody can tell; counts the questions."""

    def __init__(self, storage: Storage) -> None:
        self._storage, self.walks = storage, 0

    def __getattr__(self, name: str) -> object:
        if name == "walk":
            self.walks += 1
        return getattr(self._storage, name)


class Clock:
    """Time that goes on where somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def time_ns(self) -> int:
        return int(self.now * 1e9)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_far_storage_is_not_asked_each_time(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(tombstones, "time", clock)
    far = FarStorage(open_storage(settings.storage.root))
    graves = Tombstones(far, settings.archive.state_dir)  # type: ignore[arg-type]
    for _ in range(50):
        assert graves.deleted(["9.1"]) == set()
    assert far.walks == 1
    graves.delete(named(1), by="x")
    assert clock.now == 101  # what others saw before is a second old
    assert graves.deleted(["9.1"]) == {"9.1"}
    walks = far.walks
    for _ in range(50):
        assert graves.deleted(["9.1"]) == {"9.1"}
        assert graves.changes(graves.changes()[1])[0] == []
    assert far.walks == walks
    other = open_tombstones(settings)
    other.delete(named(2), by="y")
    clock.now += 1
    assert graves.deleted(["9.1", "9.2"]) == {"9.1", "9.2"}
    graves.close()
    other.close()


def test_on_a_local_disk_a_look_without_news_reads_nothing(
    settings: Settings, graves: Tombstones, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tombstones, "LOOK_S", 1e9)
    other = open_tombstones(settings)
    other.delete(named(1), by="x")
    _, cursor = graves.changes()
    assert graves.changes(cursor) == ([], cursor)
    state = graves.state()
    walks: list[str] = []
    walk = LocalStorage.walk
    monkeypatch.setattr(
        LocalStorage, "walk", lambda self, prefix="", **more: walks.append(prefix) or walk(self, prefix)
    )
    for _ in range(20):
        assert graves.changes(cursor) == ([], cursor)
        assert graves.deleted(["9.1"]) == {"9.1"}
        assert graves.state() == state
    assert walks == []
    other.restore(["9.1"], by="x")
    assert graves.state() != state
    assert graves.deleted(["9.1"]) == set()
    other.close()


def test_what_cannot_be_written_is_not_deleted(
    settings: Settings, graves: Tombstones, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise StorageError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(LocalStorage, "create", refuse)
        with pytest.raises(StorageError, match="disk is full"):
            graves.delete(named(1), by="x")
    assert graves.deleted(["9.1"]) == set()
    assert graves.delete(named(1), by="x") == 1
