"""Writes, syncs and publications that fail: clear errors, nothing half, and the writer goes on by itself."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sphere.conf.errors import StorageError, StorageFull
from sphere.conf.loading import from_dict
from sphere.conf.settings import Settings
from sphere.ingest.bundle import REPAIR_S, BundleWriter, FileRange
from sphere.ingest.journal import Landed
from sphere.ingest.lock import BundleLock
from sphere.ingest.recovery import recover, repair
from sphere.ingest.storage import Storage, open_storage
from sphere.ingest.storage.local import LocalStorage
from tests.support.bundles import (
    PREAMBLE,
    Clock,
    Failing,
    all_records,
    assert_sound,
    dataset_bytes,
    leave_behind,
    member_bytes,
    new_member,
)

pytestmark = [pytest.mark.unit, pytest.mark.faults]


@pytest.fixture
def archive(tmp_path: Path) -> Settings:
    return from_dict({"storage": {"root": "file:storage"}}, base=tmp_path)


@pytest.fixture
def storage(archive: Settings) -> Storage:
    return open_storage(archive.storage.root)


class Once:
    """Raises StorageFull at the first call that matches; `wrote` says that the bytes went in before it."""

    def __init__(self, call: str, ending: str, error: type[StorageError] = StorageFull) -> None:
        self.call, self.ending, self.error = call, ending, error
        self.armed = False

    def __call__(self, call: str, path: str) -> None:
        if self.armed and call == self.call and path.endswith(self.ending):
            self.armed = False
            raise self.error("injected")


@pytest.mark.parametrize("call", ["appender.write", "appender.sync", "create"])
@pytest.mark.parametrize("error", [StorageFull, StorageError])
def test_a_failed_write_is_told_and_the_next_one_goes_into_a_new_bundle(
    storage: Storage, archive: Settings, call: str, error: type[StorageError]
) -> None:
    fail = Once(call, ".tar", error)
    writer = BundleWriter(Failing(storage, fail), archive)
    good = [writer.store(new_member(1))] if call != "create" else []
    fail.armed = True
    with pytest.raises(error, match="injected"):
        writer.store(new_member(2))
    good.append(writer.store(new_member(3)))
    writer.close()
    assert len({record.bundle for record in good}) == len(good)
    assert all_records(storage) == good
    assert_sound(storage)
    assert recover(storage, archive).bundles == ()


def test_a_failed_sync_cuts_what_was_written(storage: Storage, archive: Settings) -> None:
    fail = Once("appender.sync", ".tar", StorageError)
    writer = BundleWriter(Failing(storage, fail), archive)
    first = writer.store(new_member(1))
    fail.armed = True
    with pytest.raises(StorageError, match="injected"):
        writer.store(new_member(2, dataset=b"never acknowledged" * 100))
    writer.tick()
    assert b"never acknowledged" not in storage.read(first.bundle)
    assert all_records(storage) == [first]
    writer.close()
    assert_sound(storage)


@pytest.mark.parametrize("call", ["create", "appender.write"])
def test_a_failed_journal_loses_nothing(storage: Storage, archive: Settings, call: str) -> None:
    fail = Once(call, ".journal")
    fail.armed = True
    writer = BundleWriter(Failing(storage, fail), archive)
    records = [writer.store(new_member(number)) for number in (1, 2)]
    writer.close()
    assert all_records(storage) == records
    assert_sound(storage)


def test_a_failed_seal_is_repaired(storage: Storage, archive: Settings) -> None:
    fail = Once("appender.close", ".tar")
    writer = BundleWriter(Failing(storage, fail), archive)
    record = writer.store(new_member(1))
    fail.armed = True
    writer.close()
    assert not fail.armed
    assert all_records(storage) == [record]
    assert_sound(storage)


def test_failed_publications_are_made_good(storage: Storage, archive: Settings) -> None:
    for ending in (".tar", ".journal"):
        fail = Once("appender.publish", ending)
        failing = Failing(storage, fail)
        failing.visible_at_once = False
        clock = Clock()
        writer = BundleWriter(failing, archive, clock=clock)
        record = writer.store(new_member(1))
        fail.armed = True
        clock.now += 1
        writer.tick()
        assert not fail.armed
        assert record in all_records(storage)
        later = writer.store(new_member(2))
        assert (later.bundle == record.bundle) == (ending == ".journal")  # that is written anew
        writer.close()
        assert_sound(storage)


def test_repair_is_tried_again(storage: Storage, archive: Settings) -> None:
    broken = False

    def fail(call: str, path: str) -> None:
        if broken and path.endswith(".tar") and call in ("appender.sync", "recover"):
            raise StorageError("injected")

    clock = Clock()
    writer = BundleWriter(Failing(storage, fail), archive, clock=clock)
    first = writer.store(new_member(0))
    broken = True
    with pytest.raises(StorageError, match="injected"):
        writer.store(new_member(1))
    writer.tick()
    broken = False
    assert [state.sealed for state in Landed(storage).bundles()] == [False]
    clock.now += REPAIR_S
    writer.tick()
    assert [state.sealed for state in Landed(storage).bundles()] == [True]  # cut to what was acknowledged
    second = writer.store(new_member(2))
    writer.close()
    assert all_records(storage) == [first, second]


def test_a_bundle_that_holds_nothing_is_removed_at_once(storage: Storage, archive: Settings) -> None:
    """No lease is recovered for it: on HDFS that may take long just after a node died."""

    def fail(call: str, path: str) -> None:
        if call in ("appender.sync", "recover"):
            raise StorageError("injected")

    writer = BundleWriter(Failing(storage, fail), archive)
    with pytest.raises(StorageError, match="injected"):
        writer.store(new_member(1))
    writer.tick()
    assert list(storage.walk()) == []
    writer.close()


def test_state_that_cannot_be_removed_holds_up_no_bundle(
    storage: Storage, archive: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`archive.state_dir` is mounted read-only by a kernel that met an error, or belongs to somebody else now."""
    unlink, broken = Path.unlink, [True]

    def refused(self: Path, missing_ok: bool = False) -> None:
        if broken[0] and self.is_relative_to(archive.archive.state_dir):
            raise PermissionError(errno.EROFS, "Read-only file system")
        unlink(self, missing_ok)

    failing = Failing(storage, lambda call, path: None)
    failing.visible_at_once = False
    clock = Clock()
    writer = BundleWriter(failing, archive, clock=clock)
    monkeypatch.setattr(Path, "unlink", refused)
    records = []
    for number in range(3):
        records.append(writer.store(new_member(number)))
        clock.now += archive.storage.seal_age_s + 1
        writer.tick()
    assert [state.sealed for state in Landed(storage).bundles()] == [True] * 3
    broken[0] = False
    clock.now += REPAIR_S
    writer.close()
    assert all_records(storage) == records
    assert_sound(storage)
    assert recover(storage, archive).bundles == ()


def test_a_lock_that_cannot_be_removed_is_let_go(
    storage: Storage, archive: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = Path.unlink

    def refused(self: Path, missing_ok: bool = False) -> None:
        if self.suffix == ".lock":
            raise PermissionError(errno.EROFS, "Read-only file system")
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", refused)
    for _ in range(2):
        writer = BundleWriter(storage, archive)
        writer.store(new_member(1))
        writer.close()
    assert [one.error for one in recover(storage, archive).bundles] == ["", ""]
    monkeypatch.setattr(Path, "unlink", unlink)
    assert [one.error for one in recover(storage, archive).bundles] == ["", ""]
    assert recover(storage, archive).bundles == ()
    assert_sound(storage)


def test_what_close_cannot_settle_recovery_does(storage: Storage, archive: Settings) -> None:
    def fail(call: str, path: str) -> None:
        if call in ("appender.close", "recover"):
            raise StorageError("injected")

    writer = BundleWriter(Failing(storage, fail), archive)
    record = writer.store(new_member(1))
    writer.close()
    (found,) = recover(storage, archive).bundles
    assert (found.bundle, found.members, found.error) == (record.bundle, 1, "")
    assert_sound(storage)


def test_a_waiting_file_that_shrinks_while_it_is_copied(storage: Storage, archive: Settings, tmp_path: Path) -> None:
    waiting = tmp_path / "waiting"
    waiting.write_bytes(b"x" * 3_000_000)

    def shrink(call: str, path: str) -> None:
        if call == "appender.write" and path.endswith(".tar"):
            waiting.write_bytes(b"")

    writer = BundleWriter(Failing(storage, shrink), archive)
    with pytest.raises(StorageError, match="ends 3000000 bytes early"):
        writer.store(new_member(1, dataset=FileRange(waiting, 0, 3_000_000)))
    writer.close()
    assert list(storage.walk()) == []


def test_recovery_killed_at_every_call_and_run_again(storage: Storage, archive: Settings) -> None:
    writer = BundleWriter(storage, archive)
    records = [writer.store(new_member(number)) for number in range(1, 5)]
    writer.close()
    bundle = records[0].bundle
    whole = storage.read(bundle)
    torn = whole[: records[3].offset + 10]

    class Killed(BaseException):
        pass

    def dying(after: int) -> Callable[[str, str], None]:
        left = [after]

        def fail(call: str, path: str) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Killed

        return fail

    for calls in range(100):
        leave_behind(storage, archive.archive.state_dir, bundle, torn, None)
        lock = BundleLock.take(archive.archive.state_dir, bundle)
        assert lock is not None
        try:
            repair(Failing(storage, dying(calls)), archive.archive.state_dir, bundle)
            break
        except Killed:
            pass
        finally:
            lock.release(keep=True)
        (found,) = recover(storage, archive).bundles
        assert (found.members, found.error) == (3, "")
        assert all_records(storage) == records[:3]
        assert_sound(storage)
    assert 5 < calls < 99


def test_a_full_disk(storage: Storage, archive: Settings, tmp_path: Path) -> None:
    """Files of the writing process may have 100 kB at most; root or not, the kernel then refuses the write."""
    script = """
import json, resource, signal, sys
from sphere.conf.errors import StorageFull
from sphere.conf.settings import Settings
from sphere.ingest.bundle import BundleWriter
from sphere.ingest.storage import open_storage
from tests.support.bundles import new_member
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
settings = Settings.model_validate_json(sys.argv[1])
writer = BundleWriter(open_storage(settings.storage.root), settings)
stored, full = [], 0
for number in range(60):
    try:
        stored.append([number, writer.store(new_member(number)).bundle])
    except StorageFull:
        full += 1
writer.close()
print(json.dumps([stored, full]))
"""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", script, archive.model_dump_json()]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    stored, full = json.loads(run.stdout)
    assert full >= 1
    assert len(stored) + full == 60
    recover(storage, archive)
    assert_sound(storage)
    records = {record.SOPInstanceUID: record for record in all_records(storage)}
    assert len(records) == len(stored)
    for number, bundle in stored:
        record = records[f"1.2.826.0.1.{number}"]
        assert record.bundle == bundle
        assert member_bytes(storage, record) == PREAMBLE + dataset_bytes(number)


def test_no_space_left_on_device() -> None:
    """/dev/full refuses every write with ENOSPC."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    appender = LocalStorage(Path("/dev")).append("full")
    with pytest.raises(StorageFull, match="No space left on device; free some room"):
        appender.write([b"x"])
    appender.abandon()


@pytest.mark.parametrize("failures", [1, 3, 5])
def test_members_whose_bundle_fails_go_into_another_one(storage: Storage, archive: Settings, failures: int) -> None:
    """Where nodes may die: the same bytes are worth four files, and nobody hears of it."""
    left = [0]
    attempts: list[int] = []

    def fail(call: str, path: str) -> None:
        attempts.extend([left[0]] * (call == "create" and path.endswith(".tar")))
        if call == "appender.sync" and left[0]:
            left[0] -= 1
            raise StorageError("a node died")

    writer = BundleWriter(Failing(storage, fail, attempts=4), archive)
    first = writer.store(new_member(1))
    left[0] = failures
    if failures == 5:
        with pytest.raises(StorageError, match="a node died"):
            writer.store(new_member(2))
        assert attempts == [0, 4, 3, 2]
    second = writer.store(new_member(2))
    assert second.bundle != first.bundle
    writer.close()
    assert_sound(storage)
    assert [record.SOPInstanceUID for record in all_records(storage)] == [first.SOPInstanceUID, second.SOPInstanceUID]


def test_memory_stays_flat_for_large_members(storage: Storage, archive: Settings, tmp_path: Path) -> None:
    """A member of 64 MiB goes from file to bundle in pieces of at most 1 MiB."""
    waiting = tmp_path / "waiting"
    with waiting.open("wb") as file:
        file.truncate(64 << 20)
    largest = [0]

    class Watching(LocalStorage):
        def create(self, path: str, attempt: int = 0):  # type: ignore[no-untyped-def]
            appender = super().create(path)
            write = appender.write

            def watched(buffers):  # type: ignore[no-untyped-def]
                largest[0] = max(largest[0], sum(map(len, buffers)))
                write(buffers)

            appender.write = watched  # type: ignore[method-assign]
            return appender

    writer = BundleWriter(Watching(storage.root), archive)  # type: ignore[attr-defined]
    record = writer.store(new_member(1, dataset=FileRange(waiting, 0, 64 << 20)))
    writer.close()
    assert record.length == len(PREAMBLE) + (64 << 20)
    assert largest[0] <= 1 << 20
