"""Bytes of bundles that are files of this host: what is there comes whole, and what is not costs what needs it."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from sphere.conf.errors import StorageError, StorageMissing
from sphere.ingest.storage.base import Readable
from sphere.ingest.storage.local import LocalStorage
from sphere.scp.retrieve import reading as reading_module
from sphere.scp.retrieve.read_ahead import Range, ReadAhead
from sphere.scp.retrieve.reading import InPlace, reading

pytestmark = pytest.mark.unit

DATA = random.Random(7).randbytes(10_000)


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    """Three bundles of the same bytes."""
    made = LocalStorage(tmp_path)
    for bundle in "abc":
        made.write(bundle, DATA)
    return made


@examples(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9000), st.integers(0, 900)), max_size=20),
    st.integers(1, 900),
)
def test_every_range_comes_whole_whatever_the_windows(
    tmp_path_factory: pytest.TempPathFactory, ranges: list[tuple[str, int, int]], window: int
) -> None:
    storage = LocalStorage(tmp_path_factory.getbasetemp() / "ranges")
    for bundle in "abc":
        if not storage.exists(bundle):
            storage.write(bundle, DATA)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading_module, "WINDOW", window)
        with InPlace(storage, [Range(*one) for one in ranges]) as reads:
            for _, offset, length in ranges:
                assert b"".join(reads.next()) == DATA[offset : offset + length]


def test_what_is_not_there_costs_itself(storage: LocalStorage) -> None:
    ranges = [Range("a", 0, 5), Range("a", 9990, 11), Range("missing", 0, 5), Range("b", 0, 5), Range("b", 900, 5)]
    with InPlace(storage, ranges) as reads:
        assert b"".join(reads.next()) == DATA[:5]
        with pytest.raises(StorageError, match="a ends at byte 10000, before its members do"):
            list(reads.next())
        with pytest.raises(StorageMissing, match="missing"):
            list(reads.next())
        reads.next()  # passed over without being looked at
        assert b"".join(reads.next()) == DATA[900:905]


def test_bytes_that_the_disk_does_not_give(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those beside them, which were asked for together with them, come."""
    pread = os.pread

    def failing(fd: int, length: int, offset: int) -> bytes:
        if offset < 5050 < offset + length:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(fd, length, offset)

    monkeypatch.setattr(os, "pread", failing)
    with InPlace(storage, [Range("a", 0, 100), Range("a", 5000, 100), Range("a", 6000, 100)]) as reads:
        assert len(list(reads.next())) == 1
        with pytest.raises(StorageError, match="reading a: Input/output error"):
            list(reads.next())
        assert b"".join(reads.next()) == DATA[6000:6100]


def test_a_bundle_is_open_while_it_is_read_and_read_on_when_it_was_removed(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever removes one has written what is kept of it elsewhere: those who read it need not know."""
    monkeypatch.setattr(reading_module, "WINDOW", 100)

    def opened() -> list[str]:
        paths = [one.path for one in psutil.Process().open_files()]
        return [Path(path).name.split(" ")[0] for path in paths if path.startswith(str(storage.root))]

    with InPlace(storage, [Range("a", 0, 5), Range("a", 9000, 5), Range("b", 0, 5)]) as reads:
        assert b"".join(reads.next()) == DATA[:5]
        assert opened() == ["a"]
        storage.delete("a")
        assert b"".join(reads.next()) == DATA[9000:9005]
        assert b"".join(reads.next()) == DATA[:5]
        assert opened() == ["b"]
    assert opened() == []


def test_the_kernel_is_told_what_comes_and_only_that(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(reading_module, "advise", lambda file, offset, length: told.append((offset, length)))
    monkeypatch.setattr(reading_module, "WINDOW", 100)
    monkeypatch.setattr(reading_module, "AHEAD", 3)
    monkeypatch.setattr("sphere.scp.retrieve.read_ahead.GAP", 0)
    ranges = [*(Range("a", 1000 * n, 100) for n in range(6)), Range("b", 0, 100), Range("b", 1000, 50)]
    with InPlace(storage, ranges) as reads:
        list(reads.next())
        assert told == [(1000, 100), (2000, 100), (3000, 100)]
        for _ in ranges[1:]:
            list(reads.next())
    assert told == [*((1000 * n, 100) for n in range(1, 6)), (1000, 50)]


class Elsewhere(Readable):
    """A storage that is not of this host."""

    url = "elsewhere:"

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        return DATA[offset : None if length is None else offset + length]

    def size(self, path: str) -> int:
        return len(DATA)

    def exists(self, path: str) -> bool:
        return True

    def walk(self, prefix: str = "", *, enter: Any = None) -> Any:
        return iter(())


def test_what_is_elsewhere_is_read_ahead(storage: LocalStorage) -> None:
    with reading(Elsewhere())([]) as ahead, reading(storage)([]) as in_place:
        assert (type(ahead), type(in_place)) == (ReadAhead, InPlace)
    with pytest.raises(StorageError, match="a of elsewhere: is no file of this host"):
        Elsewhere().open("a")
