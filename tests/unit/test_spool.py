"""The spool: Success at once, shipped exactly once, readable all the time."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sphere.catalog.tail import JournalTail
from sphere.conf.errors import SphereError, StorageError, StorageFull, StorageMissing
from sphere.conf.loading import from_dict
from sphere.conf.settings import Settings
from sphere.ingest import shipping, spool
from sphere.ingest.bundle import BundleWriter
from sphere.ingest.journal import Landed, journal_path
from sphere.ingest.records import MemberRecord
from sphere.ingest.recovery import recover
from sphere.ingest.set_aside import kept_aside, set_aside
from sphere.ingest.shipping import STEPS, Shipper
from sphere.ingest.spool import SpoolWriter, backlog, open_readable, open_writer, spool_settings, spool_storage
from sphere.ingest.storage import Entry, Storage, open_storage
from sphere.ingest.storage.local import LocalStorage
from sphere.status import take
from tests.support.bundles import Failing, all_records, assert_sound, member_bytes, new_member
from tests.support.receiver import ROOT

pytestmark = pytest.mark.unit


def archive(folder: Path, **ingest: Any) -> Settings:
    """An archive that spools."""
    return from_dict({"ingest": {"durability": "spool", **ingest}, "extract": {"every_s": 0}}, base=folder)


def land(settings: Settings, numbers: range, **fields: Any) -> list[MemberRecord]:
    """Store members in a sealed bundle of the spool."""
    writer = open_writer(settings)
    records = [writer.store(new_member(number, **fields)) for number in numbers]
    writer.close()
    return records


def storage_of(settings: Settings) -> Storage:
    return open_storage(settings.storage.root)


def assert_all_shipped(settings: Settings, records: list[MemberRecord]) -> None:
    """Each record once on the storage, with the bytes that it should have, and nothing in the spool."""
    storage = storage_of(settings)
    assert_sound(storage)
    assert sorted(all_records(storage), key=repr) == sorted(records, key=repr)
    assert isinstance(storage, LocalStorage)
    assert list(storage.root.rglob(".*")) == []  # copies under way, which `walk` leaves out
    assert list(spool_storage(settings).walk("bundles")) == []
    assert backlog(settings) == spool.Backlog()


def test_success_means_synced_in_the_spool_and_a_round_ships_it(tmp_path: Path) -> None:
    settings = archive(tmp_path)
    records = land(settings, range(5)) + land(settings, range(5, 9))
    assert list(storage_of(settings).walk()) == []
    assert backlog(settings).bundles == 2
    done = Shipper(settings).round()
    assert (done.bundles, done.damaged, done.error) == (2, 0, "")
    assert_all_shipped(settings, records)
    assert Shipper(settings).round().bundles == 0


def test_what_is_spooled_is_listed_and_read_before_while_and_after_it_is_shipped(tmp_path: Path) -> None:
    settings = archive(tmp_path)
    first = land(settings, range(3))
    Shipper(settings).round()
    second = land(settings, range(3, 6))
    reader = open_readable(settings)
    landed = Landed(reader)
    before: list[Any] = []

    def look(_: str = "") -> None:
        assert [state.records for state in landed.bundles()] == [3, 3]
        data = [reader.read(record.bundle, record.offset, record.length) for record in first + second]
        sizes = [(reader.size(record.bundle), reader.exists(journal_path(record.bundle))) for record in first + second]
        before[:] = before or [data, sizes]
        assert before == [data, sizes]

    look()
    assert Shipper(settings, on_step=look).round().bundles == 1
    look()
    assert_all_shipped(settings, first + second)


def test_recent_arrivals_come_once_while_they_are_shipped(tmp_path: Path) -> None:
    settings = archive(tmp_path)
    tail = JournalTail(open_readable(settings), settings.archive.state_dir, {})
    writer = open_writer(settings)
    taken: list[MemberRecord] = []
    records = []
    for number in range(4):
        records.append(writer.store(new_member(number)))
        taken += tail.take(100)
        assert taken == records
    writer.close()
    taken += tail.take(100)
    Shipper(settings, on_step=lambda _: taken.extend(tail.take(100))).round()
    tail._next_far = 0.0
    assert [*taken, *tail.take(100)] == records
    late = JournalTail(open_readable(settings), settings.archive.state_dir, {})
    assert late.take(100) == records


class Away(Failing):
    """A storage that does not answer."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner, _away)


def _away(call: str, path: str) -> None:
    raise StorageError("the NameNode does not answer")


def test_while_the_storage_is_away_arrivals_are_found_and_read_from_the_spool(tmp_path: Path) -> None:
    settings = archive(tmp_path)
    records = land(settings, range(3))
    reader = spool.SpoolFirst(spool_storage(settings), Away(storage_of(settings)))
    tail = JournalTail(reader, settings.archive.state_dir, {})
    assert tail.take(10) == records
    assert [reader.read(one.bundle, one.offset, one.length) for one in records]
    more = land(settings, range(3, 5))
    assert tail.take(10) == more
    with pytest.raises(StorageError, match="does not answer"):
        reader.read("bundles/none.tar")


def test_an_outage_leaves_everything_in_the_spool_and_the_next_round_drains_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = archive(tmp_path)
    records = land(settings, range(3)) + land(settings, range(3, 6))
    with monkeypatch.context() as patch:
        patch.setattr(shipping, "open_storage", lambda *_, **__: Away(storage_of(settings)))
        done = Shipper(settings).round()
        assert (done.bundles, done.error) == (0, "the NameNode does not answer")
    assert backlog(settings).bundles == 2
    assert Shipper(settings).round().bundles == 2
    assert_all_shipped(settings, records)


CALLS = ("exists", "delete", "create", "appender.write", "appender.close", "size", "read", "rename", "write")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
def test_a_call_that_fails_whether_it_was_done_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, done: bool
) -> None:
    settings = archive(tmp_path)
    records = land(settings, range(4))
    failed: list[str] = []

    def fail(name: str, path: str) -> None:
        if name == call and not failed:
            failed.append(name)
            raise StorageError(f"{name} failed")

    def opened(*_: Any, **__: Any) -> Storage:
        inner = storage_of(settings)
        return _FailingAfter(inner, fail) if done else Failing(inner, fail)

    monkeypatch.setattr(shipping, "open_storage", opened)
    shipper = Shipper(settings)
    assert shipper.round().error == f"{call} failed"
    assert shipper.round().error == ""
    assert failed == [call]
    assert_all_shipped(settings, records)


class _FailingAfter(Failing):
    """As Failing, but the call was done."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_") or name in ("url", "visible_at_once", "synced_is_shown", "attempts"):
            return object.__getattribute__(self, name)
        function: Callable[..., Any] = getattr(self._inner, name)

        def call(path: str = "", *arguments: Any, **options: Any) -> Any:
            answer = function(path, *arguments, **options)
            self._fail(name, path)
            return _AppenderFailingAfter(answer, path, self._fail) if name == "create" else answer

        return call


class _AppenderFailingAfter:
    def __init__(self, inner: Any, path: str, fail: Callable[[str, str], None]) -> None:
        self._inner, self._path, self._fail = inner, path, fail

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            answer = getattr(self._inner, name)(*arguments)
            if name not in ("tell", "abandon"):
                self._fail(f"appender.{name}", self._path)
            return answer

        return call


def test_a_shipper_that_is_killed_at_each_step(tmp_path: Path) -> None:
    settings = archive(tmp_path)
    records: list[MemberRecord] = []
    for step in STEPS:
        records += land(settings, range(len(records), len(records) + 3))
        run = [sys.executable, "-m", "tests.support.shipper", settings.model_dump_json(), step, "1"]
        assert subprocess.run(run, cwd=ROOT, check=False).returncode == -9, step
        reader = open_readable(settings)
        assert all(member_bytes(reader, record) for record in records)
        assert sorted(_listed(settings), key=repr) == sorted(records, key=repr), step
    assert Shipper(settings).round().error == ""
    assert_all_shipped(settings, records)


def _listed(settings: Settings) -> list[MemberRecord]:
    landed = Landed(open_readable(settings))
    return [record for state in landed.bundles() for record in landed.records(state.bundle)[0]]


def test_a_shipper_that_is_killed_while_a_copy_has_both_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a local storage a name is given by a link; the other one would keep the bytes of what is erased later."""

    class Killed(BaseException):
        pass

    def linked(path: Path, to: Path) -> None:
        os.link(path, to)
        raise Killed

    settings = archive(tmp_path)
    records = land(settings, range(3))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("sphere.ingest.storage.local._rename", linked)
        Shipper(settings).round()
    assert Shipper(settings).round().bundles == 1
    assert_all_shipped(settings, records)


def test_bundles_of_a_dead_receiver_are_sealed_and_shipped(tmp_path: Path) -> None:
    settings = archive(tmp_path)
    run = [sys.executable, "-m", "tests.support.writer", _as_writer(settings).model_dump_json()]
    with subprocess.Popen(run, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(50)]
        process.kill()
    assert Shipper(settings).round().bundles == 1
    records = all_records(storage_of(settings))
    assert_all_shipped(settings, records)
    places = {(record.bundle, record.offset) for record in records}
    for line in lines:
        _, bundle, offset, _ = line.decode().split()
        assert (bundle, int(offset)) in places


def _as_writer(settings: Settings) -> Settings:
    """Settings with which a plain bundle writer writes to the spool."""
    root = settings.storage.model_copy(update={"root": settings.ingest.spool_dir.as_uri()})
    return spool_settings(settings).model_copy(update={"storage": root})


def test_a_full_spool_refuses_until_some_is_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "LOOK_S", 0.0)
    settings = archive(tmp_path, spool_limit_mib=1)
    writer = SpoolWriter(settings)
    stored = [writer.store(new_member(1, b"x" * 400_000)), writer.store(new_member(2, b"y" * 400_000))]
    with pytest.raises(StorageFull, match="spool_limit_mib") as refused:
        writer.store(new_member(3, b"z" * 400_000))
    assert refused.value.dimse == 0xA700
    writer.close()
    Shipper(settings).round()
    again = SpoolWriter(settings)
    stored.append(again.store(new_member(3, b"z" * 400_000)))
    again.close()
    Shipper(settings).round()
    assert_all_shipped(settings, stored)


def flip(settings: Settings, bundle: str, *offsets: int) -> None:
    """Change bits of a bundle of the spool."""
    path = settings.ingest.spool_dir / bundle
    data = bytearray(path.read_bytes())
    for offset in offsets:
        data[offset] ^= 1
    path.write_bytes(data)


def test_a_bundle_whose_headers_are_damaged_stays_and_is_read_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = archive(tmp_path)
    bad, good = land(settings, range(3)), land(settings, range(3, 6))
    flip(settings, bad[0].bundle, 3)
    path = settings.ingest.spool_dir / bad[1].bundle
    reads: list[str] = []
    shipper = Shipper(settings, on_step=lambda step: reads.append(step) if step == "verify" else None)
    for shipped in (1, 0, 0, 0):
        done = shipper.round()
        assert (done.bundles, done.damaged, done.error) == (shipped, 1, "")
    assert len(reads) == 2
    assert sum("not shipped" in record.message for record in caplog.records) == 1
    assert all_records(storage_of(settings)) == good
    flip(settings, bad[0].bundle, 3)  # somebody put it in order
    done = shipper.round()
    assert (done.bundles, done.damaged, done.error) == (1, 0, "")
    assert not path.exists()
    assert_all_shipped(settings, bad + good)


def test_a_journal_that_the_disk_does_not_give_holds_up_no_other_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = archive(tmp_path)
    records = [land(settings, range(number, number + 1))[0] for number in range(3)]
    read, broken = LocalStorage.read, {journal_path(records[0].bundle)}

    def reading(self: LocalStorage, path: str, offset: int = 0, length: int | None = None) -> bytes:
        if path in broken:
            raise StorageError(f"reading {path}: Input/output error")
        return read(self, path, offset, length)

    monkeypatch.setattr(LocalStorage, "read", reading)
    shipper = Shipper(settings)
    for shipped in (2, 0):
        done = shipper.round()
        assert (done.bundles, done.damaged, done.error) == (shipped, 1, "")
    assert sum("not shipped" in record.message for record in caplog.records) == 1
    assert sorted(all_records(storage_of(settings)), key=repr) == sorted(records[1:], key=repr)
    later = recover(spool_storage(settings), spool_settings(settings), now=lambda: 4e9)
    assert (later.bundles, spool_storage(settings).exists(records[0].bundle)) == ((), True)
    broken.clear()
    assert Shipper(settings).round().bundles == 1
    assert_all_shipped(settings, records)


@pytest.mark.parametrize("killed", [False, True])
def test_the_others_of_a_damaged_instance_are_shipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, killed: bool
) -> None:
    """It is kept as it was read, and named once."""
    settings = archive(tmp_path)
    records = land(settings, range(200))
    bad = records[77]
    flip(settings, bad.bundle, bad.offset + bad.dataset_offset + 5)
    wrong = member_bytes(spool_storage(settings), bad)
    if killed:
        run = [sys.executable, "-m", "tests.support.shipper", settings.model_dump_json(), "set aside", "1"]
        assert subprocess.run(run, cwd=ROOT, check=False).returncode == -9
    shipper = Shipper(settings)
    for shipped in (1, 0, 0):
        done = shipper.round()
        assert (done.bundles, done.damaged, done.error) == (shipped, 0, "")
    assert sum("damaged and set aside" in record.message for record in caplog.records) == 1
    assert_all_shipped(settings, records[:77] + records[78:])
    [kept, said] = sorted((settings.ingest.spool_dir / "damaged").iterdir())
    assert kept.read_bytes() == wrong
    assert MemberRecord.from_json(said.read_bytes()) == bad
    assert kept_aside(settings) == 1


def test_members_set_aside_by_who_was_killed_before_the_journal(tmp_path: Path) -> None:
    settings = archive(tmp_path)
    records = land(settings, range(5))
    flip(settings, records[2].bundle, records[2].offset + records[2].dataset_offset + 5)
    journal = settings.ingest.spool_dir / journal_path(records[2].bundle)
    before = journal.read_bytes()
    set_aside(spool_storage(settings), records[2].bundle, [records[2].offset])
    journal.write_bytes(before)
    done = Shipper(settings).round()
    assert (done.bundles, done.damaged, done.error) == (1, 0, "")
    assert_all_shipped(settings, records[:2] + records[3:])


def test_nothing_but_damaged_instances(tmp_path: Path) -> None:
    settings = archive(tmp_path)
    records = land(settings, range(1, 4))
    flip(settings, records[0].bundle, *(one.offset + one.dataset_offset + 5 for one in records))
    done = Shipper(settings).round()
    assert (done.damaged, done.error) == (0, "")
    assert_all_shipped(settings, [])
    assert kept_aside(settings) == 3


def test_another_bundle_of_the_same_name_is_not_overwritten(tmp_path: Path) -> None:
    settings = archive(tmp_path)
    [record] = land(settings, range(1))
    storage_of(settings).write(record.bundle, b"something else")
    assert Shipper(settings).round().damaged == 1
    assert storage_of(settings).read(record.bundle) == b"something else"
    assert backlog(settings).bundles == 1


def test_a_quiet_bundle_is_sealed_early_and_a_busy_one_by_its_age(tmp_path: Path) -> None:
    now = [1000.0]
    settings = archive(tmp_path)
    storage = spool_storage(settings)
    writer = BundleWriter(storage, spool_settings(settings), quiet_age_s=30.0, clock=lambda: now[0])
    writer.store(new_member(1))
    for seconds in (29.0, 0.5):  # 29.5 s old
        now[0] += seconds
        writer.tick()
        assert [state.sealed for state in Landed(storage).bundles()] == [False]
    writer.store(new_member(2))
    now[0] += 0.9
    writer.tick()
    assert [state.sealed for state in Landed(storage).bundles()] == [False]  # not quiet for a second
    now[0] += 0.1
    writer.tick()
    assert [state.sealed for state in Landed(storage).bundles()] == [True]
    writer.close()


def test_one_shipper_at_a_time(tmp_path: Path) -> None:
    settings = archive(tmp_path)
    with (
        shipping.exclusive(settings),
        pytest.raises(SphereError, match="another process ships"),
        shipping.exclusive(settings),
    ):
        pass


def test_a_shipper_waits_for_another_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = archive(tmp_path)
    records = land(settings, range(3))
    stop = threading.Event()
    thread = threading.Thread(target=shipping.run_shipper, args=(settings, stop))
    with shipping.exclusive(settings):
        thread.start()
        deadline = time.monotonic() + 30
        while (state := take(settings)).spool is None or "another process ships" not in state.spool.error:
            assert time.monotonic() < deadline, state
            time.sleep(0.02)
        time.sleep(2.5)  # several tries
        assert thread.is_alive()
        assert sum("another process ships" in record.message for record in caplog.records) == 1
        assert backlog(settings).bundles == 1
    while (state := take(settings)).spool is None or state.spool.shipped_bundles != 1:  # to its last step
        assert time.monotonic() < deadline + 30, state
        time.sleep(0.02)
    stop.set()
    thread.join(30)
    assert not thread.is_alive()
    assert_all_shipped(settings, records)


def test_the_status_tells_of_the_backlog_also_while_the_storage_is_away(tmp_path: Path) -> None:
    settings = archive(tmp_path)
    land(settings, range(3))
    stop = threading.Event()
    away = settings.model_copy(
        update={"storage": settings.storage.model_copy(update={"root": "hdfs://127.0.0.1:1/nowhere"})}
    )
    thread = threading.Thread(target=shipping.run_shipper, args=(settings, stop))
    found = take(settings)
    assert found.spool is not None
    assert (found.spool.bundles, found.landed, found.problem) == (1, 0, "")
    assert "1 bundles" in str(found)
    thread.start()
    deadline = time.monotonic() + 30
    while (state := take(settings)).landed != 3 or state.spool is None or state.spool.shipped_bundles != 1:
        assert time.monotonic() < deadline, state
        time.sleep(0.02)
    [watch] = [one for one in threading.enumerate() if one.name == "watch"]
    stop.set()
    thread.join()
    watch.join(10)
    assert not watch.is_alive(), "it would end this process later"
    assert state.spool.bundles == 0
    assert "PROBLEM" in str(take(away.model_copy(update={"catalog": away.catalog.model_copy(update={"root": ""})})))


def test_readers_of_a_plain_archive_do_not_look_for_a_spool(tmp_path: Path) -> None:
    settings = from_dict({}, base=tmp_path)
    assert not isinstance(open_readable(settings), spool.SpoolFirst)
    assert isinstance(open_writer(settings), BundleWriter)


def test_walk_gives_each_file_once_in_order(tmp_path: Path) -> None:
    settings = archive(tmp_path)
    here, there = spool_storage(settings), storage_of(settings)
    for storage, names in ((here, "ac"), (there, "abc")):
        for name in names:
            storage.write(f"x/{name}", name.encode() * (2 if storage is here else 1))
    found: list[Entry] = list(open_readable(settings).walk("x"))
    assert [(entry.path, entry.size) for entry in found] == [("x/a", 2), ("x/b", 1), ("x/c", 2)]
    with pytest.raises(StorageMissing):
        open_readable(settings).size("x/none")
