"""The data set of one message while its fragments come: views of the receive buffers, or a file without a name."""

from __future__ import annotations

import hashlib
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from sphere.conf.errors import StorageError
from sphere.conf.private import make_private
from sphere.ingest import digesting
from sphere.ingest.members import FileRange

MAX_FRAGMENTS = 4096  # kept as views; a sender of smaller ones costs a file, not memory
MAX_BEHIND = 1 << 20  # bytes that wait to be digested, at most
_beside = digesting.Beside()


@dataclass(slots=True)
class Budget:
    """Bytes of memory that all associations of a process may take for arriving data sets, beyond their first buffer."""

    free: int
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def take(self, size: int) -> bool:
        """Whether `size` bytes could be had; they are then taken."""
        with self._lock:
            granted = size <= self.free
            self.free -= size if granted else 0
            return granted

    def give(self, size: int) -> None:
        """Return `size` bytes."""
        with self._lock:
            self.free += size


class WaitingFile:
    """What does not stay in memory, of one data set or of several, one after another: one descriptor for all.

    The file has no name, so that nothing of it outlives the process; it is there from the first byte on.
    """

    __slots__ = ("_file", "_folder", "size")

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: IO[bytes] | None = None
        self.size = 0

    def open(self) -> None:
        """Have the file; raises OSError."""
        if self._file is None:
            make_private(self._folder)
            self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115  closed by close

    def write(self, data: memoryview) -> None:
        """Append; raises OSError, `size` being what came in."""
        assert self._file is not None
        while data:
            written = self._file.write(data)
            self.size += written
            data = data[written:]

    def cut(self, size: int) -> None:
        """Have the first `size` bytes alone; raises OSError."""
        if self._file is not None:
            self._file.truncate(size)
            self._file.seek(size)
            self.size = size

    def range(self, offset: int, length: int) -> FileRange:
        """Bytes of it; valid until `close`."""
        assert self._file is not None
        return FileRange(Path(f"/dev/fd/{self._file.fileno()}"), offset, length)

    def close(self) -> None:
        """Give the room back."""
        if self._file is not None:
            self._file.close()


class ArrivingDataSet:
    """Bytes in the order of their arrival, never copied while they stay in memory.

    They are digested when the digest is asked for, or by the MiB.
    When the disk fails, `error` says so, and what came is dropped at once, so that others have the room, as is what
    comes later: the message still ends, and can be answered.
    A `file` that is given is shared with data sets before and after it, and is closed by who gives it.
    """

    __slots__ = (
        "_behind", "_digest", "_digested", "_file", "_folder", "_fragments", "_given", "_start", "_wait",
        "error", "size",
    )  # fmt: skip

    def __init__(self, folder: Path, file: WaitingFile | None = None) -> None:
        self._folder, self._given = folder, file
        self._fragments: list[memoryview] = []
        self._file: WaitingFile | None = None
        self._start = 0  # of the file, where it begins
        self._digest = hashlib.sha256()
        self._digested = 0  # fragments in it, and bytes of those that are not
        self._behind = 0
        self._wait: Callable[[], None] | None = None  # for what another thread does to it
        self.size = 0
        self.error: OSError | None = None

    @property
    def in_memory(self) -> bool:
        """Whether the receive buffers have to be left as they are."""
        return bool(self._fragments)

    @property
    def sha256(self) -> str:
        """Of all bytes, hexadecimal."""
        self._catch_up()
        return self._digest.hexdigest()

    def digest_one(self) -> None:
        """Have one more fragment in the digest."""
        if self._digested < len(self._fragments):
            fragment = self._fragments[self._digested]
            self._digest.update(fragment)
            self._digested, self._behind = self._digested + 1, self._behind - len(fragment)

    def digest_beside(self) -> Callable[[], str] | None:
        """Have another thread digest what is still to be; what gives `sha256` then. None where it is as well done now.

        Nothing more may be added.
        """
        if self._behind < digesting.LEAST:
            return None
        self._wait = _beside.update(self._digest, self._fragments[self._digested :])
        if self._wait is None:
            return None
        self._digested, self._behind = len(self._fragments), 0
        return lambda: self.sha256

    @property
    def fragments(self) -> int:
        """How many pieces wait in memory."""
        return len(self._fragments)

    def add(self, fragment: memoryview) -> None:
        """The next bytes: kept as the view that is given, or written to the file if there is one."""
        self.size += len(fragment)
        if self._file is None and self.error is None:
            self._fragments.append(fragment)
            self._behind += len(fragment)
            if self._behind > MAX_BEHIND:
                self._catch_up()  # while the peer prepares the next one
        else:
            self._digest.update(fragment)
            self._write(fragment)

    def spill(self) -> None:
        """Move what waits in memory to a file; what follows goes there, too. The views are given up."""
        self._catch_up()
        if self._file is None and self.error is None:
            file = self._given or WaitingFile(self._folder)
            try:
                file.open()
                self._file, self._start = file, file.size
            except OSError as error:
                self.error = error
            for fragment in self._fragments:
                self._write(fragment)
            self._fragments, self._digested = [], 0

    def content(self) -> list[memoryview] | FileRange:
        """All of it; valid until `discard`."""
        if self._file is None or self.error is not None:
            return self._fragments
        return self._file.range(self._start, self.size)

    def tobytes(self) -> bytes:
        """All of it as one value, for what is known to be small; raises StorageError."""
        content = self.content()
        return content.read(0, self.size) if isinstance(content, FileRange) else b"".join(content)

    def begin(self, size: int) -> bytes:
        """The first `size` bytes, as far as they are there."""
        content = self.content()
        if not isinstance(content, FileRange):
            begin = b""
            for one in content:
                begin += one[: size - len(begin)]
            return begin
        with suppress(StorageError):
            return content.read(0, min(size, self.size))
        return b""

    def discard(self) -> None:
        """Give memory and file back."""
        if self._wait is not None:
            with suppress(Exception):  # the memory is about to be used again; who wants the digest hears of errors
                self._wait()
        self._fragments = []
        if self._file is not None and self._file is not self._given:
            self._file.close()

    def _catch_up(self) -> None:
        """Have everything in the digest."""
        if self._wait is not None:
            self._wait()
        for fragment in self._fragments[self._digested :]:
            self._digest.update(fragment)
        self._digested, self._behind = len(self._fragments), 0

    def _write(self, data: memoryview) -> None:
        if self._file is None or self.error is not None:
            return
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            with suppress(OSError):
                self._file.cut(self._start)
