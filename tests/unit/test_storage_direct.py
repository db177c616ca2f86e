"""Large appends go past the page cache where the file system lets them, and are the same bytes where it does not."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from sphere.conf.errors import StorageError, StorageFull
from sphere.ingest.storage.direct import LEAST
from sphere.ingest.storage.local import LocalStorage

pytestmark = pytest.mark.unit

PARTS = [os.urandom(size) for size in (342, 1 << 18, 513, 9 << 17, 169)]  # together whole blocks
GROUP = b"".join([*PARTS, bytes(-sum(map(len, PARTS)) % 512)])


def _append(root: Path) -> bytes:
    """A group, a line that ends within a block, a group after it, and up to a block's end a group again."""
    storage = LocalStorage(root)
    appender = storage.create("file")
    appender.write([*PARTS, GROUP[sum(map(len, PARTS)) :]])
    assert storage.read("file", len(GROUP) - 600) == GROUP[-600:]  # its last page is in the cache now
    appender.write([b"odd"])
    appender.write([GROUP])
    appender.write([bytes(509)])
    appender.write([GROUP])
    appender.sync()
    assert appender.tell() == storage.size("file")
    appender.close()
    return storage.read("file")


EXPECTED = GROUP + b"odd" + GROUP + bytes(509) + GROUP


def test_large_and_small_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    direct: list[int] = []
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: direct.append(len(data)) or pwrite(fd, data, offset))
    assert _append(tmp_path) == EXPECTED
    assert direct[:2] == [1 << 20, len(GROUP) - (1 << 20)] or direct[1:] == []  # tmpfs may refuse the first


@pytest.mark.parametrize("taken", [0, 1, LEAST + 7], ids=["refused", "one byte", "half"])
def test_a_file_system_that_takes_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: int) -> None:
    def short(fd: int, data: memoryview, offset: int) -> int:
        if not taken:
            raise OSError(errno.EINVAL, "not aligned as this disk wants it")
        return pwrite(fd, bytes(data[:taken]), offset)

    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", short)
    monkeypatch.setattr(os, "O_DIRECT", os.O_CLOEXEC, raising=False)
    assert _append(tmp_path) == EXPECTED


def test_a_file_system_that_cannot_be_opened_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(path: object, flags: int, *mode: int) -> int:
        if flags & wanted:
            raise OSError(errno.EINVAL, "no direct input and output here")
        return opened(path, flags, *mode)  # type: ignore[arg-type]

    opened, wanted = os.open, getattr(os, "O_DIRECT", 0)
    monkeypatch.setattr(os, "open", refusing)
    assert _append(tmp_path) == EXPECTED


@pytest.mark.parametrize(("code", "error"), [(errno.EIO, StorageError), (errno.ENOSPC, StorageFull)])
def test_failures_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, error: type[StorageError]
) -> None:
    def failing(fd: int, data: memoryview, offset: int) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "pwrite", failing)
    monkeypatch.setattr(os, "O_DIRECT", os.O_CLOEXEC, raising=False)
    appender = LocalStorage(tmp_path).create("file")
    with pytest.raises(error, match=os.strerror(code)):
        appender.write([GROUP])
    appender.abandon()


LATE = b"h" * 1024 + GROUP


@pytest.mark.parametrize("taken", [0, 512, LEAST + 7, len(GROUP)], ids=["none", "block", "half", "all"])
@pytest.mark.parametrize("zeros", [0, 4096, 2 << 20], ids=["no zeros", "few zeros", "zeros"])
def test_what_goes_before_the_others_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: int, zeros: int
) -> None:
    """Whatever the file system takes of a write: the same bytes, or an error that says so."""

    def short(fd: int, data: memoryview, offset: int) -> int:
        if not taken:
            raise OSError(errno.EINVAL, "not aligned as this disk wants it")
        return pwrite(fd, bytes(data[:taken]), offset)

    pwrite = os.pwrite
    storage = LocalStorage(tmp_path)
    appender = storage.create("file")
    appender.write([GROUP])
    if zeros:
        with (tmp_path / "file").open("ab") as file:
            file.write(bytes(zeros))
        appender._zeros.end += zeros
    monkeypatch.setattr(os, "pwrite", short)
    monkeypatch.setattr(os, "O_DIRECT", os.O_CLOEXEC, raising=False)
    monkeypatch.setattr(appender._direct, "_flag", os.O_CLOEXEC)
    appender._direct.close()
    for _ in range(2):
        try:
            appender.write_late(1024, lambda: memoryview(LATE)[:1024], [b"", *PARTS, GROUP[sum(map(len, PARTS)) :]])
        except StorageError:
            assert 0 < taken < 1024  # the headers stopped half-way
            appender.abandon()
            return
    assert appender.tell() == len(GROUP) + 2 * len(LATE)
    appender.write([b"odd"])
    appender.close()
    assert storage.read("file") == GROUP + 2 * LATE + b"odd"


@pytest.mark.parametrize("after", [0, 1], ids=["the first", "the headers"])
@pytest.mark.parametrize(("code", "error"), [(errno.EIO, StorageError), (errno.ENOSPC, StorageFull)])
def test_failures_of_either_write_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, error: type[StorageError], after: int
) -> None:
    def failing(fd: int, data: memoryview, offset: int) -> int:
        nonlocal after
        after -= 1
        if after < 0:
            raise OSError(code, os.strerror(code))
        return pwrite(fd, bytes(data), offset)

    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", failing)
    monkeypatch.setattr(os, "O_DIRECT", os.O_CLOEXEC, raising=False)
    appender = LocalStorage(tmp_path).create("file")
    with pytest.raises(error, match=os.strerror(code)):
        appender.write_late(512, lambda: bytes(512), [GROUP[: 1 << 18]])
    assert appender.tell() == 0
    appender.abandon()
