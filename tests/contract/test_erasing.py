"""Members go out of a bundle, the others stay where and what they are: on every back end."""

from __future__ import annotations

import os
import tarfile
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest

from sphere.conf.errors import BundleDamaged, StorageError, StorageMissing
from sphere.conf.settings import Settings
from sphere.ingest.bundle import BundleWriter
from sphere.ingest.erasing import Erasure, erase
from sphere.ingest.journal import Landed, journal_path
from sphere.ingest.records import MemberRecord
from sphere.ingest.recovery import rebuild_journal, recover, verify
from sphere.ingest.storage import Storage, hdfs, open_storage
from sphere.ingest.storage.hdfs import HdfsStorage
from sphere.ingest.storage.paths import rewritten
from tests.contract.backends import Backend, Hdfs, Local, WebHdfs
from tests.support.bundles import Failing, gnu_tar, member_bytes, new_member

MARKER = b"PATIENT^MARKER" * 3
STEPS = ["copy", "check", "rename", "journal"]


class Killed(BaseException):
    """What stands for kill -9 here: nobody expects it."""


def landed(storage: Storage, archive: Settings) -> list[MemberRecord]:
    """Six members of one bundle; the second, the fifth and the last have what is to go, in bytes and in the journal."""
    writer = BundleWriter(storage, archive)
    records = [
        writer.store(
            new_member(
                number,
                (MARKER if number in (1, 4, 5) else b"kept") * (number * 400 + 1),
                origin=f"import:/cd/{'MARKER^NAME Müller' if number in (1, 4, 5) else 'x'}",
                collections=("trial",) if number % 2 else (),
            )
        )
        for number in range(6)
    ]
    writer.close()
    assert len({record.bundle for record in records}) == 1
    return records


def going(records: list[MemberRecord]) -> list[int]:
    return [records[number].offset for number in (1, 4, 5)]


def everything(storage: Storage) -> bytes:
    return b"".join(storage.read(entry.path) for entry in storage.walk())


class ErasingContract(Backend):
    """Every promise once."""

    def test_others_stay_and_nothing_is_left_of_it(
        self, storage: Storage, other: Storage, archive: Settings, tmp_path: Path
    ) -> None:
        records = landed(storage, archive)
        bundle = records[0].bundle
        before, size = storage.read(journal_path(bundle)), storage.size(bundle)
        live = {record.offset: member_bytes(other, record) for record in records if record.offset not in going(records)}
        assert everything(storage).count(b"MARKER") > 3
        steps: list[str] = []
        done = erase(storage, bundle, going(records), on_step=steps.append)
        assert steps == STEPS
        assert (done.members, done.size, done.removed) == (3, sum(records[n].length for n in (1, 4, 5)), False)
        assert b"MARKER" not in everything(storage)
        assert b"1.2.826.0.1.4" not in everything(storage)
        assert (storage.size(bundle), verify(storage, bundle).problems) == (size, ())
        found, end, sealed = Landed(other).records(bundle)
        assert found == [record for record in records if record.offset in live]
        assert (end, sealed) == (len(before), True)
        assert {record.offset: member_bytes(other, record) for record in found} == live
        self.lines_stay_where_they_were(storage, bundle, before)
        after = storage.read(journal_path(bundle))
        assert rebuild_journal(storage, bundle) == 0
        storage.delete(journal_path(bundle))
        rebuild_journal(storage, bundle)
        assert storage.read(journal_path(bundle)) == after
        with tarfile.open(fileobj=BytesIO(storage.read(bundle))) as archived:
            names = [item.name for item in archived]
        assert [name for name in names if name != "erased"] == [f"{record.SOPInstanceUID}.dcm" for record in found]
        assert len(names) == 6
        files = gnu_tar(storage, bundle, tmp_path / "gnu")
        assert {name: files[name] for name in files if name != "erased"} == {
            f"{record.SOPInstanceUID}.dcm": live[record.offset] for record in found
        }
        assert erase(storage, bundle, going(records)) == Erasure()

    def lines_stay_where_they_were(self, storage: Storage, bundle: str, before: bytes) -> None:
        """Who remembers how far a journal was read goes on from there."""
        lines, old = storage.read(journal_path(bundle)).split(b"\n"), before.split(b"\n")
        assert [len(line) for line in lines] == [len(line) for line in old]
        assert [at for at, line in enumerate(lines) if line != old[at]] == [1, 4, 5]
        at = len(b"\n".join(old[:3])) + 1
        assert [record.offset for record in Landed(storage).records(bundle, from_byte=at)[0]] == [
            record.offset for record in Landed(storage).records(bundle)[0][2:]
        ]

    def test_more_goes_later(self, storage: Storage, archive: Settings) -> None:
        records = landed(storage, archive)
        bundle = records[0].bundle
        erase(storage, bundle, [records[1].offset])
        kept = member_bytes(storage, records[2])
        assert erase(storage, bundle, going(records)).members == 2
        assert b"MARKER" not in everything(storage)
        assert member_bytes(storage, records[2]) == kept
        assert verify(storage, bundle).problems == ()
        done = erase(storage, bundle, [record.offset for record in records])
        assert (done.members, done.removed, done.freed > 0) == (3, True, True)
        assert list(storage.walk()) == []
        assert erase(storage, bundle, [record.offset for record in records]) == Erasure()

    @pytest.mark.parametrize("step", STEPS)
    def test_killed_and_done_again(self, storage: Storage, archive: Settings, step: str) -> None:
        records = landed(storage, archive)
        bundle = records[0].bundle
        live = {record: member_bytes(storage, record) for record in records if record.offset not in going(records)}

        def kill(name: str) -> None:
            if name == step:
                raise Killed

        with pytest.raises(Killed):
            erase(storage, bundle, going(records), on_step=kill)
        assert {record: member_bytes(storage, record) for record in live} == live
        recover(storage, archive, now=lambda: 1e12)
        assert {record: member_bytes(storage, record) for record in live} == live
        erase(storage, bundle, going(records))
        assert b"MARKER" not in everything(storage)
        assert {record: member_bytes(storage, record) for record in live} == live
        assert verify(storage, bundle).problems == ()

    @pytest.mark.parametrize("step", ["remove", "remove journal"])
    def test_killed_while_it_is_removed(self, storage: Storage, archive: Settings, step: str) -> None:
        records = landed(storage, archive)

        def kill(name: str) -> None:
            if name == step:
                raise Killed

        with pytest.raises(Killed):
            erase(storage, records[0].bundle, [record.offset for record in records], on_step=kill)
        erase(storage, records[0].bundle, [record.offset for record in records])
        assert list(storage.walk()) == []

    def test_a_lost_bundle_keeps_its_journal(self, storage: Storage, archive: Settings) -> None:
        records = landed(storage, archive)
        lines = storage.read(journal_path(records[0].bundle))
        storage.delete(records[0].bundle)
        with pytest.raises(BundleDamaged, match="it is gone, and its journal names members that were not to go"):
            erase(storage, records[0].bundle, going(records))
        assert storage.read(journal_path(records[0].bundle)) == lines

    def test_what_a_dead_process_left_does_not_stand_in_the_way(self, storage: Storage, archive: Settings) -> None:
        records = landed(storage, archive)
        storage.write(rewritten(records[0].bundle), b"half of it, and MARKER")
        erase(storage, records[0].bundle, going(records))
        assert not storage.exists(rewritten(records[0].bundle))

    def test_damage_is_left_as_it_is(self, storage: Storage, archive: Settings) -> None:
        records = landed(storage, archive)
        bundle = records[0].bundle
        data, lines = storage.read(bundle), storage.read(journal_path(bundle))
        at = records[2].offset + records[2].dataset_offset
        for broken, message in (
            (data[:at] + b"X" + data[at + 1 :], "other bytes than its sha256 says"),
            (data[: len(data) - 512], "not an end-of-archive"),
        ):
            storage.write(bundle, broken)
            with pytest.raises(BundleDamaged, match=message):
                erase(storage, bundle, going(records))
            assert storage.read(bundle) == broken
        storage.write(bundle, data)
        with pytest.raises(BundleDamaged, match="no member begins at byte 1"):
            erase(storage, bundle, [1])
        storage.write(journal_path(bundle), lines.replace(b"1.2.826.0.1.2", b"1.2.826.0.1.3"))
        with pytest.raises(BundleDamaged, match="has another member"):
            erase(storage, bundle, going(records))
        storage.delete(journal_path(bundle))
        with pytest.raises(BundleDamaged, match="no journal"):
            erase(storage, bundle, going(records))
        assert storage.read(bundle) == data

    def test_rewrite_replaces_whole_or_not_at_all(self, storage: Storage, other: Storage) -> None:
        storage.write("a/file", b"old")
        seen: list[bytes] = []
        pieces = [b"new", 3, b"er", 20_000_000, b"end"]
        storage.rewrite("a/file", lambda: pieces, check=lambda path: seen.append(storage.read(path, 0, 8)))
        assert (seen, other.size("a/file")) == ([b"new\0\0\0er"], 20_000_011)
        assert other.read("a/file", 19_999_990) == bytes(18) + b"end"

        def refuse(path: str) -> None:
            raise BundleDamaged("no")

        with pytest.raises(BundleDamaged, match="no"):
            storage.rewrite("a/file", lambda: [b"x"], check=refuse)
        assert other.size("a/file") == 20_000_011
        assert [entry.path for entry in storage.walk()] == ["a/file"]
        assert not storage.exists(rewritten("a/file"))


class TestLocal(ErasingContract, Local):
    def test_room_comes_back(self, storage: Storage, archive: Settings, tmp_path: Path) -> None:
        writer = BundleWriter(storage, archive)
        records = [writer.store(new_member(n, os.urandom(4 << 20))) for n in range(4)]
        writer.close()
        path = tmp_path / "storage folder" / records[0].bundle
        before, size = path.stat().st_blocks, path.stat().st_size
        with storage.open(records[0].bundle) as reader:
            done = erase(storage, records[0].bundle, [records[1].offset, records[2].offset])
            assert os.pread(reader.fileno(), 99, records[1].offset + records[1].dataset_offset) != bytes(99)
        assert done.freed == 512 * (before - path.stat().st_blocks)
        assert done.freed > 8_000_000
        assert path.stat().st_size == size

    def test_who_could_read_it_still_can(self, storage: Storage, archive: Settings, tmp_path: Path) -> None:
        records = landed(storage, archive)
        files = [tmp_path / "storage folder" / name for name in (records[0].bundle, journal_path(records[0].bundle))]
        for file in files:
            file.chmod(0o664)
            if os.getuid() == 0:
                os.chown(file, 1234, 5678)
        before = [(file.stat().st_mode, file.stat().st_uid, file.stat().st_gid) for file in files]
        erase(storage, records[0].bundle, going(records))
        assert [(file.stat().st_mode, file.stat().st_uid, file.stat().st_gid) for file in files] == before

    def test_a_file_that_has_another_name_gives_no_room(self, storage: Storage, tmp_path: Path) -> None:
        storage.write("file", bytes(range(256)) * 4096)
        os.link(tmp_path / "storage folder" / "file", tmp_path / "snapshot")
        assert storage.rewrite("file", lambda: [1 << 20], check=lambda _: None) == 0
        assert (tmp_path / "snapshot").read_bytes() == bytes(range(256)) * 4096

    @pytest.mark.parametrize("call", ["rewrite", "size", "read", "write"])
    def test_a_storage_that_fails_changes_nothing(self, storage: Storage, archive: Settings, call: str) -> None:
        records = landed(storage, archive)
        live = {record: member_bytes(storage, record) for record in records if record.offset not in going(records)}

        def fail(name: str, path: str) -> None:
            if name == call:
                raise StorageError("not today")

        with pytest.raises(StorageError, match="not today"):
            erase(Failing(storage, fail), records[0].bundle, going(records))
        assert {record: member_bytes(storage, record) for record in live} == live
        erase(storage, records[0].bundle, going(records))
        assert verify(storage, records[0].bundle).problems == ()

    def test_a_copy_that_differs_does_not_take_the_place(self, storage: Storage, archive: Settings) -> None:
        records = landed(storage, archive)
        bundle = records[0].bundle
        data = storage.read(bundle)
        for spoil in (_flipped, _shorter):
            with pytest.raises(StorageError, match=r"other bytes than were written|another size"):
                erase(_Spoiling(storage, spoil), bundle, going(records))
            assert storage.read(bundle) == data


class _Spoiling(Failing):
    """A storage on which what is written anew is not what was given."""

    def __init__(self, inner: Storage, spoil: object) -> None:
        super().__init__(inner, lambda name, path: None)
        self._spoil = spoil

    def __getattribute__(self, name: str) -> object:
        if name != "rewrite":
            return super().__getattribute__(name)
        inner, spoil = self._inner, self._spoil
        return lambda path, pieces, *, check: inner.rewrite(path, lambda: spoil(pieces()), check=check)  # type: ignore[operator]


def _flipped(pieces: Iterator[bytes | int]) -> Iterator[bytes | int]:
    for number, piece in enumerate(pieces):
        yield piece[:-1] + b"\1" if number == 0 and isinstance(piece, bytes) else piece


def _shorter(pieces: Iterator[bytes | int]) -> Iterator[bytes | int]:
    yield from list(pieces)[:-1]


class TestHdfs(ErasingContract, Hdfs):
    def test_who_read_it_just_now_reads_on(self, storage: Storage, other: Storage, archive: Settings) -> None:
        records = landed(storage, archive)
        kept = member_bytes(other, records[2])
        erase(storage, records[0].bundle, going(records))
        assert member_bytes(other, records[2]) == kept
        erase(storage, records[0].bundle, [record.offset for record in records])
        assert not other.exists(records[0].bundle)

    def test_who_kept_the_places_of_blocks_reads_on_when_these_are_gone(
        self, storage: Storage, other: Storage, archive: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """DataNodes remove the blocks of a replaced file within some seconds."""
        records = landed(storage, archive)
        kept = member_bytes(other, records[2])
        anew: list[str] = []
        forget = HdfsStorage._forget
        monkeypatch.setattr(hdfs, "READER_S", 300.0)
        erase(storage, records[0].bundle, going(records))
        monkeypatch.setattr(HdfsStorage, "_forget", lambda self, full: anew.append(full) or forget(self, full))
        for _ in range(20):
            assert member_bytes(other, records[2]) == kept
            if anew:
                break
            time.sleep(1)
        assert anew

    def test_a_file_that_a_dead_process_was_writing(self, storage: Storage, other: Storage, archive: Settings) -> None:
        records = landed(storage, archive)
        appender = other.create(rewritten(records[0].bundle))
        appender.write([b"half of it"])
        appender.sync()
        erase(storage, records[0].bundle, going(records))
        assert verify(storage, records[0].bundle).problems == ()
        appender.abandon()
        assert not other.exists(rewritten(records[0].bundle))


class TestWebHdfs(ErasingContract, WebHdfs):
    """webhdfs://"""


@pytest.mark.unit
def test_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageMissing):
        open_storage(tmp_path.as_uri()).rewrite("none", lambda: [b"x"], check=lambda _: None)
