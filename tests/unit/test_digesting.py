"""Digests that another thread takes: the same ones, waited for before the memory is used again, and never wrong."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sphere.conf.loading import from_dict
from sphere.ingest.bundle import BundleWriter
from sphere.ingest.digesting import LEAST, Beside
from sphere.ingest.members import prepare
from sphere.ingest.recovery import recover
from sphere.ingest.storage import open_storage
from sphere.ingest.storage.local import LocalStorage
from sphere.scp.upper.dataset import MAX_BEHIND, ArrivingDataSet
from tests.support.bundles import all_records, assert_sound, member_bytes, new_member

pytestmark = pytest.mark.unit

LARGE = os.urandom(LEAST + 1000)


class Slow:
    """A digest that goes on when it is told to, and fails where it is to."""

    def __init__(self, error: Exception | None = None) -> None:
        self.go = threading.Event()
        self.error = error
        self.digest = hashlib.sha256()

    def update(self, data: memoryview) -> None:
        assert self.go.wait(10)
        if self.error is not None:
            raise self.error
        self.digest.update(data)


def arriving(folder: Path, data: bytes, step: int = 1 << 15) -> ArrivingDataSet:
    dataset = ArrivingDataSet(folder)
    for at in range(0, len(data), step):
        dataset.add(memoryview(data)[at : at + step])
    return dataset


@pytest.mark.parametrize("size", [0, 1, LEAST - 1, LEAST, MAX_BEHIND, MAX_BEHIND + 1, 3 * MAX_BEHIND + 12345])
@pytest.mark.parametrize("step", [7777, 1 << 17])
def test_the_same_digest_wherever_it_is_taken(tmp_path: Path, size: int, step: int) -> None:
    data = os.urandom(size)
    expected = hashlib.sha256(data).hexdigest()
    assert arriving(tmp_path, data, step).sha256 == expected
    dataset = arriving(tmp_path, data, step)
    if (digested := dataset.digest_beside()) is not None:
        assert digested() == digested() == expected
    assert dataset.sha256 == expected
    dataset.discard()
    spilt = arriving(tmp_path, data, step)
    spilt.spill()
    spilt.add(memoryview(b"more"))
    assert spilt.sha256 == hashlib.sha256(data + b"more").hexdigest()
    assert spilt.digest_beside() is None
    spilt.discard()


def test_what_is_digested_while_the_peer_sends(tmp_path: Path) -> None:
    """A fragment at a time, never one twice, and no more than there are; the rest is left to another thread."""
    dataset, digested = ArrivingDataSet(tmp_path), hashlib.sha256()
    dataset.digest_one()
    for at in range(0, len(LARGE), 1 << 15):
        fragment = memoryview(LARGE)[at : at + (1 << 15)]
        dataset.add(fragment)
        dataset.digest_one()
        dataset.digest_one()
        digested.update(fragment)
        assert dataset._digest.hexdigest() == digested.hexdigest()
    assert dataset.digest_beside() is None  # nothing is left
    dataset.add(memoryview(LARGE))
    last = dataset.digest_beside()
    assert last is not None
    assert last() == hashlib.sha256(2 * LARGE).hexdigest()
    dataset.discard()


def test_small_ones_wake_nobody(tmp_path: Path) -> None:
    assert arriving(tmp_path, LARGE[: LEAST - 1]).digest_beside() is None
    assert arriving(tmp_path, LARGE[:LEAST]).digest_beside() is not None


def test_one_at_a_time() -> None:
    beside, slow = Beside(), Slow()
    wait = beside.update(slow, [memoryview(LARGE)])
    assert wait is not None
    assert beside.update(hashlib.sha256(), [memoryview(LARGE)]) is None
    slow.go.set()
    wait()
    assert slow.digest.hexdigest() == hashlib.sha256(LARGE).hexdigest()
    again = hashlib.sha256()
    while (wait := beside.update(again, [memoryview(LARGE)])) is None:
        pass
    wait()
    assert again.hexdigest() == hashlib.sha256(LARGE).hexdigest()


def test_no_room_for_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    beside = Beside()
    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", refused)
        assert [beside.update(hashlib.sha256(), []) for _ in range(2)] == [None, None]
    wait = beside.update(hashlib.sha256(), [])
    assert wait is not None
    wait()


def test_an_error_is_told_to_who_waits_each_time() -> None:
    beside, slow = Beside(), Slow(MemoryError("no room"))
    wait = beside.update(slow, [memoryview(LARGE)])
    assert wait is not None
    slow.go.set()
    for _ in range(2):
        with pytest.raises(MemoryError, match="no room"):
            wait()


def test_memory_is_given_back_after_the_digest(tmp_path: Path) -> None:
    dataset, slow, given = arriving(tmp_path, LARGE), Slow(), []
    dataset._digest = slow  # type: ignore[assignment]
    assert dataset.digest_beside() is not None
    discarding = threading.Thread(target=lambda: (dataset.discard(), given.append(True)))
    discarding.start()
    discarding.join(0.1)
    assert given == []
    slow.go.set()
    discarding.join(10)
    assert given == [True]
    assert slow.digest.hexdigest() == hashlib.sha256(LARGE).hexdigest()


def late(data: bytes, number: int = 1, digested: Callable[[], str] | None = None, **fields: Any) -> Any:
    """A member whose digest is known when it is asked for."""
    given = digested or (lambda: hashlib.sha256(data).hexdigest())
    return new_member(number, dataset=[memoryview(data)], digested=given, **fields)


@pytest.mark.parametrize("uid", ["1.2.3", "no uid", "\udcff"])
@pytest.mark.parametrize("collections", [(), ("trial",)])
def test_headers_are_those_of_a_digest_known_before(uid: str, collections: tuple[str, ...]) -> None:
    fields: dict[str, Any] = {"SOPInstanceUID": uid, "collections": collections}
    before = prepare(new_member(1, dataset=LARGE, **fields))
    after = prepare(late(LARGE, **fields))
    assert after.header != before.header and len(after.header) == len(before.header)
    assert after.settle() == after.settle() == before.header
    assert (after.said, after.fields) == (before.said, before.fields)


def test_what_is_stored_late_is_as_what_is_stored_at_once(tmp_path: Path) -> None:
    """Alone and in groups, of odd and even sizes, among others."""
    settings = from_dict({"storage": {"root": "file:storage"}}, base=tmp_path)
    storage = open_storage(settings.storage.root)
    writer = BundleWriter(storage, settings)
    sizes = [LEAST, LEAST + 1, 512, 40_000, 1 << 20, (9 << 17) + 3, 0]
    sent = {number: os.urandom(size) for number, size in enumerate(sizes * 3)}
    for number in range(7):
        writer.store(late(sent[number], number))
        writer.store(new_member(100 + number))
    threads = [
        threading.Thread(target=writer.store, args=(late(sent[number], number),)) for number in range(7, len(sent))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    assert_sound(storage)
    records = {record.SOPInstanceUID: record for record in all_records(storage)}
    for number, data in sent.items():
        record = records[f"1.2.826.0.1.{number}"]
        assert member_bytes(storage, record)[record.dataset_offset :] == data
        assert record.sha256 == hashlib.sha256(data).hexdigest()


def test_an_error_of_digesting_is_one_of_its_member_alone(tmp_path: Path) -> None:
    """Neither of the others in its group, nor of what the keeper of the bundle has to do."""
    settings = from_dict({"storage": {"root": "file:storage"}}, base=tmp_path)
    storage = open_storage(settings.storage.root)
    writer = BundleWriter(storage, settings)
    leads, told, done = threading.Event(), [], []

    def slow() -> str:
        assert leads.wait(10)
        return hashlib.sha256(LARGE).hexdigest()

    def fails() -> str:
        raise MemoryError("no room")

    def store(number: int, digested: Callable[[], str] | None) -> None:
        try:
            writer.store(late(LARGE, number, digested))
        except MemoryError as error:
            told.append((number, str(error)))

    threads = [threading.Thread(target=store, args=(1, slow))]
    threads += [threading.Thread(target=store, args=(number, fails if number == 3 else None)) for number in (2, 3, 4)]
    threads += [threading.Thread(target=lambda: done.append(writer._alone(lambda: "done")))]
    for number, thread in enumerate(threads):
        thread.start()
        while len(writer._groups._queue) < number or not writer._groups._led:
            time.sleep(0.001)
    leads.set()
    for thread in threads:
        thread.join()
    store(5, fails)
    assert (told, done) == ([(3, "no room"), (5, "no room")], ["done"])
    writer.close()
    assert {record.SOPInstanceUID for record in all_records(storage)} == {f"1.2.826.0.1.{n}" for n in (1, 2, 4)}
    assert_sound(storage)


class Killed(BaseException):
    """The process is gone."""


def test_a_writer_that_dies_before_the_headers(tmp_path: Path) -> None:
    """The bytes of the member are there, its headers are not: recovery cuts it, and keeps all that was acknowledged."""
    settings = from_dict({"storage": {"root": "file:storage"}}, base=tmp_path)
    storage = open_storage(settings.storage.root)
    writer = BundleWriter(storage, settings)
    kept = [writer.store(late(LARGE, 1)), writer.store(new_member(2))]
    torn = tmp_path / "torn"
    [path] = (tmp_path / "storage").rglob("*.tar")

    def dies() -> str:
        torn.write_bytes(path.read_bytes())
        raise Killed

    with pytest.raises(Killed):
        writer.store(late(LARGE, 3, dies))
    found = torn.read_bytes()
    end = -(-(kept[1].offset + kept[1].length) // 512) * 512
    assert len(found) > end + len(LARGE) and not any(found[end : end + 512]) and LARGE in found[end:]
    later = writer.store(late(LARGE, 4))  # into another bundle
    assert later.bundle != kept[0].bundle
    writer.close()
    assert_sound(storage)
    assert {record.SOPInstanceUID for record in all_records(storage)} == {f"1.2.826.0.1.{n}" for n in (1, 2, 4)}

    path.write_bytes(found)
    journal = path.with_suffix(".journal")
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:2]))
    locks = settings.archive.state_dir / "locks"
    (locks / f"{path.stem}.lock").touch()
    report = recover(storage, settings)
    assert [(one.bundle, one.members, one.error) for one in report.bundles] == [(kept[0].bundle, 2, "")]
    assert_sound(storage)
    assert member_bytes(storage, kept[0])[kept[0].dataset_offset :] == LARGE


def test_the_headers_come_after_all_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = LocalStorage(tmp_path)
    appender = storage.create("file")
    appender.write([bytes(512)])
    seen: list[bytes] = []

    def head() -> bytes:
        seen.append(storage.read("file"))
        return b"h" * 1024

    appender.write_late(1024, head, [LARGE[:LEAST]])
    appender.sync()
    assert appender.tell() == 512 + 1024 + LEAST
    assert storage.read("file") == bytes(512) + b"h" * 1024 + LARGE[:LEAST]
    assert seen in ([bytes(512 + 1024) + LARGE[:LEAST]], [bytes(512)])  # where the file system has no direct writes
    appender.close()
