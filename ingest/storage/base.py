"""What every storage back end promises: one contract, held by one test suite (tests/contract)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO

from sphere.conf.errors import StorageError

Buffer = bytes | bytearray | memoryview
Piece = bytes | int
"""A part of a file that is written anew: bytes, or so many zeros."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the storage: path below the root, size in bytes, modification time in seconds since 1970 (UTC)."""

    path: str
    size: int
    mtime: float


class Appender(ABC):
    """One file being written at its end, by one thread at a time."""

    @abstractmethod
    def tell(self) -> int:
        """Bytes written so far, durable or not."""

    @abstractmethod
    def write(self, buffers: Sequence[Buffer]) -> None:
        """Append the buffers in order; raises StorageFull or StorageError."""

    def write_late(self, size: int, head: Callable[[], Buffer], buffers: Sequence[Buffer]) -> None:
        """Append `size` bytes that `head` gives, and the buffers behind them, which may be written before `head` is
        asked; raises StorageError, and what `head` raises: the caller abandons the file then.

        Until it returns, what stands in the place of those bytes are zeros, if anything.
        """
        self.write([head(), *buffers])

    @abstractmethod
    def sync(self) -> None:
        """Return when everything written is durable (fdatasync, hsync); raises StorageError.

        After an error nothing is known of the bytes since the last good sync: the caller abandons the file.
        """

    def prepare(self) -> None:  # noqa: B027  where there is nothing to be done beforehand
        """Do what the next writes would have to wait for; raises StorageError, after which the file is abandoned.

        Where writes are `visible_at_once` it may be called while another thread writes, and the file be longer than
        `tell` until it is closed: by zeros, which recovery cuts.
        """

    @property
    def unprepared(self) -> bool:
        """Whether it is time for `prepare`, as writes come fast."""
        return False

    @abstractmethod
    def publish(self) -> None:
        """Return when everything written is durable and readable by every process of every host."""

    @abstractmethod
    def close(self) -> None:
        """Publish and let go; the file can be appended to again with `Storage.append`."""

    @abstractmethod
    def abandon(self) -> None:
        """Let go without raising and without promising anything of what was not synced."""


class Readable(ABC):
    """Files below one root URL, to be read. Paths are relative, with "/", never begin with "/" nor contain "..".

    Safe to use from several threads.
    """

    url: str
    in_files: bool = False  # whether they are files of this host, which `open` opens

    def open(self, path: str) -> FileIO:
        """The file itself, for who reads much of it; to be closed. Raises StorageMissing, and StorageError, also where
        they are not `in_files`."""
        raise StorageError(f"{path} of {self.url} is no file of this host")

    @abstractmethod
    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        """Bytes ``[offset, offset + length)``, to the end where `length` is None; fewer only at the end of the file.

        Raises StorageMissing.
        """

    @abstractmethod
    def size(self, path: str) -> int:
        """Bytes readable now; raises StorageMissing."""

    @abstractmethod
    def exists(self, path: str) -> bool:
        """Whether a file of that name is there."""

    @abstractmethod
    def walk(self, prefix: str = "", *, enter: Callable[[Entry], bool] | None = None) -> Iterator[Entry]:
        """Every file below the folder `prefix`, in the order of their paths; nothing where it does not exist.

        `enter` is asked for each folder below it (an Entry of size 0) whether it is to be listed. The modification time
        of a folder changes when a file or folder comes to it or leaves it.
        """


class Storage(Readable):
    """Files that can be written as well."""

    visible_at_once: bool = False  # whether every process reads what was written without waiting for `publish`
    synced_is_shown: bool = False  # whether every process reads what was synced: `publish` has nothing else to do
    attempts: int = 1  # files that the same bytes are worth, one after another, where writing them fails

    @abstractmethod
    def create(self, path: str, attempt: int = 0) -> Appender:
        """A new file (its folders made and synced); raises StorageError where it exists.

        `attempt` counts the files that failed just now for the same bytes: HDFS places a later one otherwise.
        """

    @abstractmethod
    def append(self, path: str) -> Appender:
        """An existing file, to go on at its end; raises StorageMissing."""

    @abstractmethod
    def write(self, path: str, data: bytes, *, durable: bool = True) -> None:
        """Replace the whole file atomically, and durably unless `durable` is False: what nobody needs after a crash."""

    @abstractmethod
    def rewrite(self, path: str, pieces: Callable[[], Iterable[Piece]], *, check: Callable[[str], None]) -> int:
        """Replace a file that nobody writes to, atomically and durably, by `pieces` in order; returns how many bytes
        the storage has more room for.

        Zeros take no room where the storage can leave them out. `check` is called with the path under which the new
        file is until it takes the place of the old one, and what it raises leaves the old one as it is. Who reads the
        old one goes on; `pieces` may be asked for again. One process at a time may do so for a file.
        """

    @abstractmethod
    def rename(self, path: str, to: str) -> None:
        """Give a closed file another name in the same folder, atomically and durably; raises StorageError where there
        is one of that name, StorageMissing where there is none of the first."""

    @abstractmethod
    def truncate(self, path: str, size: int) -> None:
        """Cut a file that nobody writes to `size` bytes, durably."""

    @abstractmethod
    def recover(self, path: str) -> int:
        """Make a file whose writer died readable (lease recovery on HDFS); returns its size in bytes."""

    @abstractmethod
    def delete(self, path: str) -> None:
        """Remove a file; nothing happens where it does not exist."""
