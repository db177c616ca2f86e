"""What ingest/storage/base.py promises, on every back end."""

from __future__ import annotations

import os
import threading
import time

import pytest

from sphere.conf.errors import StorageError, StorageMissing
from sphere.ingest.storage import Entry, Storage, open_storage
from sphere.ingest.storage.hdfs import HdfsAppender
from tests.contract.backends import Backend, Hdfs, Local, WebHdfs

REPORTED_S = 0.5
"""Seconds in which every DataNode tells the NameNode of a closed block.

HDFS closes a file as soon as one of them did: an append in between leaves the other's replica behind, and the append
after that one fails (a bundle then goes on in another file).
"""
BAD_PATHS = ["/abs", "../up", "a/../b", "a//b", "./a", "a/.", "", "a\0b", "a/"]


class StorageContract(Backend):
    """Every promise once."""

    def test_writes_are_read_back_in_order(self, storage: Storage, other: Storage) -> None:
        appender = storage.create("a/b/file.bin")
        assert appender.tell() == 0
        appender.write([b"one", bytearray(b"two"), memoryview(b"three"), b""])
        assert appender.tell() == 11
        appender.sync()
        appender.write([b"!"])
        appender.close()
        assert other.read("a/b/file.bin") == b"onetwothree!"
        assert other.size("a/b/file.bin") == 12

    def test_what_is_given_last_and_stands_first(self, storage: Storage) -> None:
        appender = storage.create("late")
        expected = b""
        for size, length in ((1536, 1 << 18), (512, 700_160), (3, 5), (1, 1 << 17), (1024, 3 << 20), (512, 0)):
            head, data = os.urandom(size), os.urandom(length)
            appender.write_late(size, lambda head=head: memoryview(head), [data[:1000], data[1000:]])  # type: ignore[misc]
            appender.sync()
            expected += head + data
            assert appender.tell() == len(expected)
        appender.close()
        assert storage.read("late") == expected

    def test_many_buffers_large_and_small(self, storage: Storage) -> None:
        buffers = [bytes([number % 256]) * (number * 37 % 3000) for number in range(2100)]
        buffers.insert(1000, b"L" * 9_000_000)  # over a block of the test cluster, over every buffer of ours
        appender = storage.create("many")
        appender.write(buffers)
        appender.close()
        assert storage.read("many") == b"".join(buffers)

    @pytest.mark.parametrize(
        ("offset", "length", "expected"),
        [
            (0, None, b"0123456789"),
            (4, None, b"456789"),
            (2, 3, b"234"),
            (8, 100, b"89"),
            (10, None, b""),
            (10, 5, b""),
            (99, 1, b""),
            (3, 0, b""),
        ],
    )
    def test_ranges(self, storage: Storage, offset: int, length: int | None, expected: bytes) -> None:
        storage.write("digits", b"0123456789")
        assert storage.read("digits", offset, length) == expected

    def test_published_bytes_are_readable_while_the_file_is_open(self, storage: Storage, other: Storage) -> None:
        appender = storage.create("open")
        for number in range(3):
            appender.write([b"%d" % number])
            appender.publish()
            assert other.read("open") == b"012"[: number + 1]
            assert other.read("open", number, 1) == b"%d" % number
        appender.close()
        assert other.size("open") == 3

    def test_visible_at_once_is_true_to_its_name(self, storage: Storage, other: Storage) -> None:
        if storage.visible_at_once:
            storage.create("now").write([b"x"])
            assert other.read("now") == b"x"

    def test_synced_is_shown_is_true_to_its_name(self, storage: Storage, other: Storage) -> None:
        if storage.synced_is_shown:
            appender = storage.create("now")
            appender.write([b"x"])
            appender.sync()
            assert other.read("now") == b"x"

    def test_append_goes_on_at_the_end(self, storage: Storage) -> None:
        storage.create("log").close()
        for word in (b"a", b"bc", b"def"):
            time.sleep(REPORTED_S)
            appender = storage.append("log")
            appender.write([word])
            appender.close()
            appender.close()
        assert appender.tell() == 6
        assert storage.read("log") == b"abcdef"

    def test_abandoned_files_keep_what_was_synced(self, storage: Storage, other: Storage) -> None:
        appender = storage.create("dead")
        appender.write([b"synced"])
        appender.sync()
        appender.write([b"maybe"])
        appender.abandon()
        appender.abandon()
        size = other.recover("dead")
        assert size == other.size("dead") == len(other.read("dead"))
        assert other.read("dead").startswith(b"synced")

    def test_recovery_of_a_file_that_nobody_writes(self, storage: Storage) -> None:
        storage.write("whole", b"1234")
        assert storage.recover("whole") == 4

    def test_write_replaces_the_whole_file(self, storage: Storage, other: Storage) -> None:
        storage.write("x/state", b"long first version")
        assert other.read("x/state") == b"long first version"
        storage.write("x/state", b"second")
        assert other.read("x/state") == b"second"
        assert storage.read("x/state", 0, 6) == b"second"
        storage.write("x/state", b"")
        assert other.read("x/state") == b""
        assert [entry.path for entry in storage.walk()] == ["x/state"]

    def test_write_of_what_need_not_outlast_a_crash_is_read_at_once(self, storage: Storage, other: Storage) -> None:
        storage.write("x/passing", b"first", durable=False)
        storage.write("x/passing", b"second", durable=False)
        assert other.read("x/passing", 1, 3) == b"eco"
        assert [entry.path for entry in storage.walk()] == ["x/passing"]

    def test_rename_gives_another_name_and_replaces_nothing(self, storage: Storage, other: Storage) -> None:
        storage.write("x/.hidden", b"old" * 3)
        assert storage.read("x/.hidden", 0, 3) == b"old"
        storage.delete("x/.hidden")
        appender = storage.create("x/.hidden")
        appender.write([b"whole"])
        appender.close()
        storage.rename("x/.hidden", "x/name")
        assert other.read("x/name") == b"whole"
        assert not other.exists("x/.hidden")
        storage.write("x/second", b"2")
        with pytest.raises(StorageError, match="x/second"):
            storage.rename("x/second", "x/name")
        assert other.read("x/name") == b"whole"
        with pytest.raises(StorageMissing):
            storage.rename("x/none", "x/other")

    @pytest.mark.parametrize("size", [0, 1, 511, 5_000_000, 6_000_000])
    def test_truncate(self, storage: Storage, size: int) -> None:
        data = bytes(range(250)) * 24_000
        storage.write("cut", data)
        storage.truncate("cut", size)
        assert storage.read("cut") == data[:size]
        appender = storage.append("cut")
        assert appender.tell() == size
        appender.write([b"end"])
        appender.close()
        assert storage.read("cut") == data[:size] + b"end"

    def test_truncate_does_not_lengthen(self, storage: Storage) -> None:
        storage.write("cut", b"12")
        with pytest.raises(StorageError, match="shorter than 3 bytes"):
            storage.truncate("cut", 3)

    def test_walk_is_in_the_order_of_paths(self, storage: Storage) -> None:
        paths = ["a.tar", "a/b/c", "a/b.x", "a0", "b/z", "top"]
        for path in paths:
            storage.write(path, path.encode())
        found = list(storage.walk())
        assert [entry.path for entry in found] == sorted(paths)
        assert [entry.size for entry in found] == [len(path) for path in sorted(paths)]
        assert all(entry.mtime > 1.7e9 for entry in found)
        assert [entry.path for entry in storage.walk("a")] == ["a/b.x", "a/b/c"]
        assert [entry.path for entry in storage.walk("a/")] == ["a/b.x", "a/b/c"]
        assert list(storage.walk("nothing")) == []

    def test_walk_lists_the_folders_that_it_is_to_enter(self, storage: Storage) -> None:
        for path in ("a/b/one", "a/c/two", "a/d.x/three", "top"):
            storage.write(path, b"x")
        asked: list[Entry] = []

        def enter(folder: Entry) -> bool:
            asked.append(folder)
            return folder.path != "a/c"

        assert [entry.path for entry in storage.walk(enter=enter)] == ["a/b/one", "a/d.x/three", "top"]
        assert sorted(folder.path for folder in asked) == ["a", "a/b", "a/c", "a/d.x"]
        assert all(folder.size == 0 and folder.mtime > 1.7e9 for folder in asked)
        assert [entry.path for entry in storage.walk("a/c", enter=enter)] == ["a/c/two"]
        before = {folder.path: folder.mtime for folder in asked}
        asked.clear()
        time.sleep(0.02)  # as fine as the folders' times are
        storage.write("a/b/more", b"x")
        list(storage.walk("a", enter=enter))
        after = {folder.path: folder.mtime for folder in asked}
        assert after["a/b"] > before["a/b"]
        assert after["a/c"] == before["a/c"]

    def test_an_empty_root_has_nothing(self, storage: Storage) -> None:
        assert list(storage.walk()) == []
        assert not storage.exists("x")

    def test_delete(self, storage: Storage) -> None:
        storage.write("d/x", b"1")
        storage.delete("d/x")
        storage.delete("d/x")
        storage.delete("never/was")
        assert not storage.exists("d/x")

    def test_exists_is_about_files(self, storage: Storage) -> None:
        storage.write("folder/file", b"")
        assert storage.exists("folder/file")
        assert not storage.exists("folder")

    def test_create_does_not_overwrite(self, storage: Storage, other: Storage) -> None:
        storage.write("once", b"first")
        with pytest.raises(StorageError, match=r"creating .*once"):
            other.create("once")
        assert storage.read("once") == b"first"

    @pytest.mark.parametrize("call", ["read", "size", "append", "recover", "truncate"])
    def test_missing_files(self, storage: Storage, call: str) -> None:
        arguments = ("gone", 0) if call == "truncate" else ("gone",)
        with pytest.raises(StorageMissing, match="gone"):
            getattr(storage, call)(*arguments)

    @pytest.mark.parametrize("path", BAD_PATHS)
    @pytest.mark.parametrize("call", ["create", "append", "read", "size", "exists", "recover", "delete"])
    def test_paths_stay_below_the_root(self, storage: Storage, call: str, path: str) -> None:
        with pytest.raises(StorageError, match="not a path below the storage root"):
            getattr(storage, call)(path)

    def test_paths_of_walk_write_and_truncate_too(self, storage: Storage) -> None:
        with pytest.raises(StorageError, match="not a path below"):
            list(storage.walk("../x"))
        with pytest.raises(StorageError, match="not a path below"):
            storage.write("../x", b"")
        with pytest.raises(StorageError, match="not a path below"):
            storage.truncate("../x", 0)

    def test_odd_names(self, storage: Storage) -> None:
        names = ["with space", "per%20cent", "ümlaut", "a+b&c=d#e;f"]
        for name in names:
            storage.write(f"odd/{name}", name.encode())
        assert [entry.path for entry in storage.walk("odd")] == sorted(f"odd/{name}" for name in names)
        for name in names:
            assert storage.read(f"odd/{name}") == name.encode()

    def test_reads_of_several_threads(self, storage: Storage) -> None:
        data = bytes(range(256)) * 4000
        storage.write("shared", data)
        wrong: list[int] = []

        def read(first: int) -> None:
            for offset in range(first, len(data), 100_003):
                if storage.read("shared", offset, 1000) != data[offset : offset + 1000]:
                    wrong.append(offset)

        threads = [threading.Thread(target=read, args=(number * 777,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


class TestLocal(Local, StorageContract):
    """file:///"""


class TestHdfs(Hdfs, StorageContract):
    """hdfs://"""

    @pytest.mark.parametrize("refusals", [1, 2, 3])
    def test_a_block_closed_just_now_is_appended_to_a_little_later(
        self, storage: Storage, refusals: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """DataNodes were seen to refuse it ("corrupted replica"); nothing is at stake then, and nothing is lost."""
        left, probe = [refusals], HdfsAppender.probe

        def refused(appender: HdfsAppender) -> None:
            probe(appender)
            if left[0]:
                left[0] -= 1
                raise StorageError("the DataNode closed the connection")

        storage.write("closed", b"before")
        monkeypatch.setattr(HdfsAppender, "probe", refused)
        if refusals == 3:
            with pytest.raises(StorageError, match="closed the connection"):
                storage.append("closed")
        else:
            appender = storage.append("closed")
            appender.write([b", after"])
            appender.close()
            assert storage.read("closed") == b"before, after"
        assert left == [0]
        assert storage.recover("closed") == len(storage.read("closed"))


class TestWebHdfs(WebHdfs, StorageContract):
    """webhdfs://"""


@pytest.mark.unit
@pytest.mark.parametrize("url", ["s3://bucket", "file:relative", "file://elsewhere/x", "hdfs:///nowhere", "storage"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(StorageError, match="storage root"):
        open_storage(url)
