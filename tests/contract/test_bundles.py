"""What bundles, journals and recovery promise, on every back end."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from operator import attrgetter
from pathlib import Path

import pytest

from sphere.conf.errors import BundleDamaged, StorageError
from sphere.conf.settings import Settings
from sphere.ingest.bundle import BundleWriter, FileRange
from sphere.ingest.journal import Landed, bundle_id, journal_path, mirror_path
from sphere.ingest.records import MemberRecord
from sphere.ingest.recovery import rebuild_journal, recover, repair, verify
from sphere.ingest.storage import Storage
from tests.contract.backends import Backend, Hdfs, Local, WebHdfs
from tests.support.bundles import (
    PREAMBLE,
    Clock,
    all_records,
    assert_sound,
    dataset_bytes,
    gnu_tar,
    leave_behind,
    member_bytes,
    new_member,
)


class BundleContract(Backend):
    """Every promise once."""

    cuts_per_bundle = 8  # torn tails tried
    kills = 1

    def test_members_are_kept_byte_for_byte(self, storage: Storage, archive: Settings, tmp_path: Path) -> None:
        waiting = tmp_path / "waiting"
        waiting.write_bytes(b"skip" + b"0123456789" * 250_000 + b"tail")
        datasets = {
            "1.2.3": dataset_bytes(5),
            "1.2.4": [b"frag", bytearray(b"ment"), memoryview(b"ed")],
            "1.2.5": FileRange(waiting, 4, 2_500_000),
            "1.2.6": b"",
        }
        writer = BundleWriter(storage, archive)
        records = {uid: writer.store(new_member(SOPInstanceUID=uid, dataset=data)) for uid, data in datasets.items()}
        writer.close()
        expected = {
            "1.2.3": dataset_bytes(5),
            "1.2.4": b"fragmented",
            "1.2.5": b"0123456789" * 250_000,
            "1.2.6": b"",
        }
        for uid, data in expected.items():
            record = records[uid]
            assert member_bytes(storage, record) == PREAMBLE + data
            assert (record.dataset_offset, record.sha256) == (len(PREAMBLE), hashlib.sha256(data).hexdigest())
        assert all_records(storage) == list(records.values())
        assert_sound(storage)
        extracted = gnu_tar(storage, records["1.2.3"].bundle, tmp_path / "extracted")
        assert extracted == {f"{uid}.dcm": PREAMBLE + data for uid, data in expected.items()}

    def test_threads_share_a_bundle(self, storage: Storage, archive: Settings) -> None:
        writer = BundleWriter(storage, archive)
        stored: dict[int, MemberRecord] = {}

        def send(first: int) -> None:
            for number in range(first, first + 8):
                stored[number] = writer.store(new_member(number))

        threads = [threading.Thread(target=send, args=(number * 8,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        writer.close()
        assert len(stored) == 64
        for number, record in stored.items():
            assert member_bytes(storage, record) == PREAMBLE + dataset_bytes(number)
        assert all_records(storage) == sorted(stored.values(), key=attrgetter("bundle", "offset"))  # two may take turns
        assert_sound(storage)

    def test_journal_is_seen_here_at_once_and_elsewhere_when_published(
        self, storage: Storage, other: Storage, archive: Settings
    ) -> None:
        clock = Clock()
        writer = BundleWriter(storage, archive, clock=clock)
        here, elsewhere = Landed(other, archive.archive.state_dir), Landed(other)
        record = writer.store(new_member(1))
        assert here.records(record.bundle, unpublished=True)[0] == [record]
        clock.now += 1
        writer.tick()
        records, next_byte, sealed = elsewhere.records(record.bundle)
        assert (records, sealed) == ([record], False)
        assert member_bytes(other, record) == PREAMBLE + dataset_bytes(1)
        second = writer.store(new_member(2))
        assert here.records(record.bundle, from_byte=next_byte, unpublished=True)[0] == [second]
        (state,) = elsewhere.bundles()
        assert (state.bundle, state.sealed, state.records) == (record.bundle, False, None)
        writer.close()
        records, end, sealed = elsewhere.records(record.bundle, from_byte=next_byte)
        assert (records, sealed) == ([second], True)
        (state,) = elsewhere.bundles()
        assert (state.records, state.sealed, state.journal_size) == (2, True, end)
        assert elsewhere.records(record.bundle, from_byte=end)[:2] == ([], end)
        assert list(elsewhere.bundles(skip={record.bundle})) == []
        assert not mirror_path(archive.archive.state_dir, record.bundle).exists()

    def test_a_bundle_is_published_by_itself(self, storage: Storage, other: Storage, archive: Settings) -> None:
        writer = BundleWriter(storage, archive)
        record = writer.store(new_member(1))
        published = threading.Event()
        for _ in range(600):
            if Landed(other).records(record.bundle)[0] == [record]:
                break
            published.wait(0.05)
        assert Landed(other).records(record.bundle)[0] == [record]
        writer.close()

    def test_sealed_by_size_and_by_age(self, storage: Storage, other: Storage, archive: Settings) -> None:
        small = archive.model_copy(update={"storage": archive.storage.model_copy(update={"seal_mib": 1})})
        clock = Clock()
        writer = BundleWriter(storage, small, clock=clock)
        first = writer.store(new_member(1, dataset=b"x" * 1_100_000))
        second = writer.store(new_member(2))
        assert second.bundle > first.bundle
        writer.tick()
        assert [state.sealed for state in Landed(other).bundles()] == [True, False]
        clock.now += small.storage.seal_age_s
        writer.tick()
        assert [state.sealed for state in Landed(other).bundles()] == [True, True]
        third = writer.store(new_member(3))
        assert third.bundle > second.bundle
        writer.close()
        assert_sound(storage)

    def test_nothing_stored_leaves_nothing(self, storage: Storage, archive: Settings) -> None:
        writer = BundleWriter(storage, archive)
        writer.close()
        assert list(storage.walk()) == []
        with pytest.raises(StorageError, match="closed"):
            writer.store(new_member())
        assert list(storage.walk()) == []

    def test_torn_tails_are_cut(self, storage: Storage, archive: Settings, tmp_path: Path) -> None:
        whole, records, ends = _a_bundle(storage, archive)
        bundle = records[0].bundle
        state_dir = archive.archive.state_dir
        boundaries = range(0, len(whole) + 1, 512)
        places = sorted({at + shift for at in boundaries for shift in (-1, 0, 1) if 0 <= at + shift <= len(whole)})
        step = max(1, len(places) // self.cuts_per_bundle)
        for place in sorted({*places[::step], len(whole) - 512, len(whole) - 1, len(whole)}):
            leave_behind(storage, state_dir, bundle, whole[:place], None)
            (found,) = recover(storage, archive).bundles
            kept = sum(1 for end in ends if end <= place)
            assert (found.members, found.error) == (kept, ""), place
            assert all_records(storage) == records[:kept]
            assert storage.exists(bundle) == bool(kept)
            assert_sound(storage)
            assert recover(storage, archive).bundles == ()
        assert set(gnu_tar(storage, bundle, tmp_path / "out")) == {f"{one.SOPInstanceUID}.dcm" for one in records}

    def test_journals_are_completed(self, storage: Storage, archive: Settings) -> None:
        whole, records, ends = _a_bundle(storage, archive)
        bundle = records[0].bundle
        journal = storage.read(journal_path(bundle))
        second_line = journal.index(b"\n", journal.index(b"\n") + 1) + 1
        for kept in (0, 10, second_line - 1, second_line, second_line + 20):
            leave_behind(storage, archive.archive.state_dir, bundle, whole[: ends[-1]], journal[:kept])
            (found,) = recover(storage, archive).bundles
            assert (found.error, found.cut) == ("", 0)
            assert found.lines_added == len(records) + 1 - journal[:kept].count(b"\n")
            assert storage.read(journal_path(bundle)) == journal  # so that readers go on from the byte they know
        storage.delete(journal_path(bundle))
        assert rebuild_journal(storage, bundle) == len(records) + 1
        assert rebuild_journal(storage, bundle) == 0
        assert storage.read(journal_path(bundle)) == journal

    def test_a_bundle_that_lost_members_is_reported_and_kept(self, storage: Storage, archive: Settings) -> None:
        whole, records, ends = _a_bundle(storage, archive)
        bundle = records[0].bundle
        journal = storage.read(journal_path(bundle))
        unsealed = journal[: journal.rindex(b"\n", 0, -1) + 1]
        damaged = whole[: ends[0] + 100] + b"\xff" * 100 + whole[ends[0] + 200 :]
        leave_behind(storage, archive.archive.state_dir, bundle, damaged, unsealed)
        for _ in range(2):
            (found,) = recover(storage, archive).failed
            assert "members of its journal are not in it" in found.error
            assert storage.read(bundle) == damaged
        assert Landed(storage).records(bundle)[0] == records
        assert verify(storage, bundle).problems[0].startswith(f"at byte {ends[0]}")

    def test_bytes_that_did_not_reach_the_disk(self, storage: Storage, archive: Settings) -> None:
        whole, records, ends = _a_bundle(storage, archive)
        state_dir, bundle = archive.archive.state_dir, records[0].bundle
        storage.delete(journal_path(bundle))
        last = records[-1]
        torn = whole[: last.offset + 300] + bytes(last.length - 300) + whole[last.offset + last.length : ends[-1]]
        leave_behind(storage, state_dir, bundle, torn, None)
        (found,) = recover(storage, archive).bundles
        assert (found.members, found.error) == (len(records) - 1, "")
        assert_sound(storage)
        first = records[0]
        storage.delete(journal_path(bundle))
        torn = whole[: first.offset + 300] + bytes(first.length - 300) + whole[first.offset + first.length : ends[-1]]
        leave_behind(storage, state_dir, bundle, torn, None)
        (found,) = recover(storage, archive).bundles  # in any order: later members of the group did
        assert (found.members, found.error) == (len(records), "")
        assert all_records(storage) == records[1:]
        assert [member_bytes(storage, one) for one in records[1:]] == [
            whole[one.offset : one.offset + one.length] for one in records[1:]
        ]
        assert not any(storage.read(bundle)[: ends[0]][-first.length :])
        aside = f"damaged/{bundle_id(bundle)}-{first.offset}.dcm"
        assert storage.read(aside) == torn[first.offset : first.offset + first.length]
        assert_sound(storage)
        assert recover(storage, archive).bundles == ()

    def test_what_a_writer_has_synced_is_not_cut(self, storage: Storage, archive: Settings) -> None:
        """Not even where neither journal nor mirror says so."""
        whole, records, ends = _a_bundle(storage, archive)
        bundle = records[0].bundle
        storage.delete(journal_path(bundle))
        last = records[-1]
        for broken in (last.offset + 300, ends[-2] + 100):
            damaged = bytearray(whole[: ends[-1]])
            damaged[broken] ^= 1
            storage.write(bundle, bytes(damaged))
            with pytest.raises(BundleDamaged, match="not as they were synced"):
                repair(storage, archive.archive.state_dir, bundle, keep=ends[-1])
            assert storage.read(bundle) == damaged

    def test_living_writers_are_left_alone(self, storage: Storage, other: Storage, archive: Settings) -> None:
        writer = BundleWriter(storage, archive)
        record = writer.store(new_member(1))
        assert recover(other, archive, now=lambda: 4e9).bundles == ()
        second = writer.store(new_member(2))
        assert second.bundle == record.bundle
        writer.close()
        assert recover(other, archive, now=lambda: 4e9).bundles == ()
        assert_sound(storage)

    def test_idle_bundles_of_other_hosts(self, storage: Storage, archive: Settings) -> None:
        whole, records, ends = _a_bundle(storage, archive)
        bundle = records[0].bundle
        storage.delete(journal_path(bundle))
        storage.write(bundle, whole[: ends[1]])
        (entry,) = storage.walk()
        idle = 2 * archive.storage.seal_age_s + 60
        assert recover(storage, archive, now=lambda: entry.mtime + idle - 1).bundles == ()
        (found,) = recover(storage, archive, now=lambda: entry.mtime + idle + 1).bundles
        assert (found.members, found.error) == (2, "")
        assert_sound(storage)

    def test_locks_without_a_bundle_are_removed(self, storage: Storage, archive: Settings) -> None:
        locks = archive.archive.state_dir / "locks"
        locks.mkdir(parents=True)
        (locks / "20260101T000000Z-h-1-aa.lock").touch()
        assert recover(storage, archive).bundles == ()
        assert list(locks.iterdir()) == []

    def test_nothing_acknowledged_is_lost_by_kill_9(self, storage: Storage, archive: Settings, tmp_path: Path) -> None:
        acknowledged: list[tuple[int, str, int, int]] = []
        for _ in range(self.kills):
            acknowledged += _killed_writer(archive, after=60)
        report = recover(storage, archive)
        assert report.failed == ()
        assert len(report.bundles) >= 1
        assert_sound(storage)
        present = [(record.bundle, record.offset, record.length) for record in all_records(storage)]
        assert len(present) == len(set(present))
        for number, bundle, offset, length in acknowledged:
            assert (bundle, offset, length) in present
            assert storage.read(bundle, offset, length) == PREAMBLE + dataset_bytes(number)
        assert len(acknowledged) >= 60 * self.kills
        assert not list((archive.archive.state_dir / "locks").iterdir())

    def test_journals_that_cannot_be_read_on(self, storage: Storage, archive: Settings) -> None:
        _, records, _ = _a_bundle(storage, archive)
        bundle = records[0].bundle
        with pytest.raises(BundleDamaged, match="no line begins at byte 7"):
            Landed(storage).records(bundle, from_byte=7)
        storage.write(journal_path(bundle), b'{"bundle": 1}\nhalf')
        with pytest.raises(BundleDamaged, match="a line that is no record"):
            Landed(storage).records(bundle)
        storage.write(journal_path(bundle), b"half")
        assert Landed(storage).records(bundle) == ([], 0, False)


def _a_bundle(storage: Storage, archive: Settings) -> tuple[bytes, list[MemberRecord], list[int]]:
    """A sealed bundle of four members: its bytes, its records, and where each member's padding ends."""
    writer = BundleWriter(storage, archive)
    records = [writer.store(new_member(number)) for number in (1, 2, 40, 97)]
    records.append(writer.store(new_member(3)))
    writer.close()
    ends = [record.offset + record.length + -record.length % 512 for record in records]
    return storage.read(records[0].bundle), records, ends


def _killed_writer(archive: Settings, *, after: int) -> list[tuple[int, str, int, int]]:
    """What a process acknowledged before it was killed (-9), four threads storing."""
    command = [sys.executable, "-m", "tests.support.writer", archive.model_dump_json()]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(after)]
    process.send_signal(signal.SIGKILL)
    lines += process.stdout.readlines()
    process.wait()
    acknowledged = []
    for line in lines:
        if line.endswith("\n"):  # the last one may be torn
            number, bundle, offset, length = line.split()
            acknowledged.append((int(number), bundle, int(offset), int(length)))
    return acknowledged


class TestLocal(Local, BundleContract):
    """file:///"""

    cuts_per_bundle = 100
    kills = 3


class SharedContract(BundleContract):
    """Where several hosts write."""

    @pytest.mark.parametrize("published", [True, False])
    def test_a_writer_that_another_host_took_for_dead(
        self, storage: Storage, other: Storage, archive: Settings, tmp_path: Path, published: bool
    ) -> None:
        """It stood still for long (its host was suspended, or has another time), and goes on in the end."""
        clock = Clock()
        writer = BundleWriter(storage, archive, clock=clock)
        records = [writer.store(new_member(1))]
        if published:
            clock.now += 1
            writer.tick()
        elsewhere = archive.model_copy(
            update={"archive": archive.archive.model_copy(update={"state_dir": tmp_path / "elsewhere"})}
        )
        (found,) = recover(other, elsewhere, now=lambda: 4e9).bundles
        assert (found.members, found.error) == (1, "")
        for number in (2, 3):
            with suppress(StorageError):  # its sender sends it again
                records.append(writer.store(new_member(number)))
        assert len(records) > 1
        clock.now += 1
        writer.tick()
        writer.close()
        assert all_records(other) == records
        numbers = [int(record.SOPInstanceUID.rpartition(".")[2]) for record in records]
        assert [member_bytes(other, record) for record in records] == [PREAMBLE + dataset_bytes(one) for one in numbers]
        assert_sound(other)


class TestHdfs(Hdfs, SharedContract):
    """hdfs://"""


class TestWebHdfs(WebHdfs, SharedContract):
    """webhdfs://"""

    cuts_per_bundle = 4
