"""Zeros behind the end of a file: bytes go over them, they are gone when it is closed, and recovery cuts them."""

from __future__ import annotations

import errno
import os
import random
import threading
from pathlib import Path

import pytest

from sphere.conf.errors import StorageError
from sphere.conf.loading import from_dict
from sphere.conf.settings import Settings
from sphere.ingest import bundle
from sphere.ingest.bundle import BundleWriter
from sphere.ingest.recovery import recover
from sphere.ingest.storage import ahead
from sphere.ingest.storage.direct import LEAST
from sphere.ingest.storage.local import LocalAppender, LocalStorage
from tests.support.bundles import PREAMBLE, all_records, assert_sound, leave_behind, member_bytes, new_member

pytestmark = pytest.mark.unit

SMALL = os.urandom(LEAST)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "STEP", 1 << 16)
    monkeypatch.setattr(ahead, "FREE", 0)


def _prepared(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> LocalAppender:
    """A file with two small writes and zeros behind them."""
    monkeypatch.setattr(os, "O_DIRECT", os.O_CLOEXEC, raising=False)  # whatever file system the test has
    appender = storage.create("file")
    for _ in range(2):
        appender.write([SMALL])
    appender.sync()
    appender.prepare()
    assert storage.size("file") >= appender.tell() + 4 * LEAST
    return appender


def test_bytes_go_over_them_and_the_rest_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = LocalStorage(tmp_path)
    appender = _prepared(storage, monkeypatch)
    size = storage.size("file")
    for part in (SMALL, SMALL[:512]):
        appender.write([part])
    appender.sync()
    assert (storage.size("file"), appender.tell()) == (size, 3 * LEAST + 512)
    assert storage.read("file") == (3 * SMALL + SMALL[:512]).ljust(size, b"\0")
    appender.close()
    assert storage.read("file") == 3 * SMALL + SMALL[:512]


def test_a_write_past_their_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = LocalStorage(tmp_path)
    appender = _prepared(storage, monkeypatch)
    large = os.urandom(storage.size("file") + ahead.LONE)
    appender.write([large])
    assert storage.read("file") == 2 * SMALL + large
    appender.prepare()
    assert storage.size("file") == appender.tell()  # not a small write
    appender.close()
    assert storage.read("file") == 2 * SMALL + large


def test_what_cannot_go_over_them_ends_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = LocalStorage(tmp_path)
    appender = _prepared(storage, monkeypatch)
    appender.write([b"odd"])
    assert storage.read("file") == 2 * SMALL + b"odd"
    appender.write([bytes(509), SMALL])
    appender.prepare()
    assert storage.size("file") == appender.tell()
    appender.close()
    assert storage.read("file") == 2 * SMALL + b"odd" + bytes(509) + SMALL


@pytest.mark.parametrize("taken", [0, 700])
def test_a_write_over_them_that_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: int) -> None:
    def short(fd: int, data: memoryview, offset: int) -> int:
        if not taken:
            raise OSError(errno.EINVAL, "no")
        return pwrite(fd, data[:taken], offset)

    storage = LocalStorage(tmp_path)
    appender = _prepared(storage, monkeypatch)
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", short)
    appender.write([SMALL])
    appender.close()
    assert storage.read("file") == 3 * SMALL


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EOPNOTSUPP, errno.EIO])
def test_zeros_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int) -> None:
    """No room for them is no failure; a disk that fails is."""
    storage = LocalStorage(tmp_path)
    appender = _prepared(storage, monkeypatch)
    while storage.size("file") >= appender.tell() + LEAST:
        appender.write([SMALL])

    def failing(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        if code == errno.EIO:
            with pytest.raises(StorageError, match="zeros"):
                appender.prepare()
        else:
            appender.prepare()
    written = appender.tell()
    appender.write([SMALL])
    appender.close()
    assert storage.read("file") == (written // LEAST + 1) * SMALL


@pytest.mark.parametrize(("what", "writes"), [("prepare", 4), ("close", 1)])  # more zeros are due, or there are some
def test_a_file_that_somebody_cuts_is_not_made_whole_with_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, writes: int
) -> None:
    storage = LocalStorage(tmp_path)
    appender = _prepared(storage, monkeypatch)
    for _ in range(writes):
        appender.write([SMALL])
    os.truncate(tmp_path / "file", LEAST + 7)
    with pytest.raises(StorageError, match="Input/output error"):
        getattr(appender, what)()
    appender.abandon()
    assert storage.size("file") == LEAST + 7


def test_a_disk_that_is_nearly_full_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "FREE", 1 << 60)
    storage = LocalStorage(tmp_path)
    appender = storage.create("file")
    appender.write([SMALL])
    appender.prepare()
    assert storage.size("file") == LEAST


def test_zeros_are_added_while_bytes_are_written(tmp_path: Path) -> None:
    """Sizes that fit and that do not, across the end of the zeros, against the other thread: none is lost."""
    storage, chance, over = LocalStorage(tmp_path), random.Random(4), threading.Event()
    for number in range(4):
        appender = storage.create(f"file{number}")
        over.clear()

        def keep(appender: LocalAppender = appender) -> None:
            while not over.is_set():
                appender.prepare()

        thread = threading.Thread(target=keep)
        thread.start()
        expected = bytearray()
        for _ in range(150):
            part = os.urandom(512 * chance.randrange(1, 300))
            appender.write([part])
            expected += part
        if number % 2:
            appender.write([b"odd"])
            expected += b"odd"
        over.set()
        thread.join()
        appender.sync()
        assert storage.read(f"file{number}", 0, len(expected)) == expected
        appender.close()
        assert storage.read(f"file{number}") == expected


def test_a_burst_gets_more_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "O_DIRECT", os.O_CLOEXEC, raising=False)
    storage = LocalStorage(tmp_path)
    appender, ahead_of_it = storage.create("file"), []
    for _ in range(4):
        due = 0
        while not appender.unprepared:
            appender.write([SMALL])
            due += 1
        assert due >= ahead.FEW
        appender.prepare()
        ahead_of_it.append(storage.size("file") - appender.tell())
        assert not appender.unprepared
    assert all(zeros >= 8 * LEAST << number for number, zeros in enumerate(ahead_of_it)), ahead_of_it
    for _ in range(ahead.FEW):  # no burst of small ones
        appender.write([SMALL * 9])
    assert not appender.unprepared
    appender.close()


def test_where_there_is_no_room_nobody_hurries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "O_DIRECT", os.O_CLOEXEC, raising=False)
    monkeypatch.setattr(ahead, "FREE", 1 << 60)
    appender = LocalStorage(tmp_path).create("file")
    hurries = []
    for _ in range(3):
        for _ in range(ahead.FEW):
            appender.write([SMALL])
        hurries.append(appender.unprepared)
        appender.prepare()
    assert hurries == [True, False, False]
    appender.close()


@pytest.fixture
def archive(tmp_path: Path) -> Settings:
    return from_dict({"storage": {"root": "file:storage"}}, base=tmp_path)


def test_a_bundle_gets_them_and_is_sealed_without(
    archive: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "O_DIRECT", os.O_CLOEXEC, raising=False)
    storage = LocalStorage(tmp_path / "storage")
    writer = BundleWriter(storage, archive)
    records = [writer.store(new_member(1, dataset=SMALL))]
    writer.tick()
    assert storage.size(records[0].bundle) > records[0].offset + 2 * LEAST
    records += [writer.store(new_member(number, dataset=SMALL)) for number in (2, 3)]
    assert [member_bytes(storage, record) for record in records] == [PREAMBLE + SMALL] * 3
    writer.close()
    assert all_records(storage) == records
    assert_sound(storage)


def test_a_burst_does_not_wait_for_the_keeper(
    archive: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "O_DIRECT", os.O_CLOEXEC, raising=False)
    monkeypatch.setattr(bundle, "PREPARE_S", 3600)
    prepared, prepare = threading.Event(), LocalAppender.prepare

    def told(self: LocalAppender) -> None:
        prepare(self)
        prepared.set()

    monkeypatch.setattr(LocalAppender, "prepare", told)
    storage = LocalStorage(tmp_path / "storage")
    writer = BundleWriter(storage, archive)
    records = [writer.store(new_member(number, dataset=SMALL)) for number in range(ahead.FEW)]
    assert prepared.wait(60)
    assert storage.size(records[0].bundle) >= records[-1].offset + 4 * LEAST
    writer.close()
    assert all_records(storage) == records


def test_a_failed_preparation_leaves_the_bundle(
    archive: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: LocalAppender) -> None:
        raise StorageError("injected")

    storage = LocalStorage(tmp_path / "storage")
    writer = BundleWriter(storage, archive)
    with monkeypatch.context() as patch:
        patch.setattr(LocalAppender, "prepare", failing)
        first = writer.store(new_member(1))
        writer.tick()
    second = writer.store(new_member(2))
    writer.close()
    assert first.bundle != second.bundle
    assert all_records(storage) == [first, second]
    assert_sound(storage)


@pytest.mark.parametrize("zeros", [512, 1024, 1536, 1 << 20])
@pytest.mark.parametrize("torn", [False, True])
def test_recovery_cuts_them(archive: Settings, tmp_path: Path, zeros: int, torn: bool) -> None:
    """A killed writer leaves them; so does one whose machine lost its power in the middle of a member."""
    storage = LocalStorage(tmp_path / "storage")
    writer = BundleWriter(storage, archive)
    records = [writer.store(new_member(number, dataset=SMALL)) for number in range(1, 4)]
    writer.close()
    bundle = records[0].bundle
    data = storage.read(bundle)[:-1024]
    if torn:
        data = data[: records.pop().offset + 5000] + bytes(LEAST)
    journal = b"".join(record.to_json() + b"\n" for record in records)
    leave_behind(storage, archive.archive.state_dir, bundle, data + bytes(zeros), journal)
    (found,) = recover(storage, archive).bundles
    assert (found.members, found.error) == (len(records), "")
    assert all_records(storage) == records
    assert_sound(storage)
