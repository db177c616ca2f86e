"""Storage on HDFS over its native protocol (``hdfs://NAMENODE:PORT/PATH``, also a name service of HADOOP_CONF_DIR).

An open file's last block cannot be read by this client, so what was synced is durable but hidden until `publish`, which
closes the file; the next write opens it again.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import unquote, urlsplit

from hdfs_native import Client, FileReader, FileWriter, WriteOptions

from sphere.conf.errors import StorageError, StorageFull, StorageMissing
from sphere.ingest.storage.base import Appender, Buffer, Entry, Storage
from sphere.ingest.storage.deadline import Deadline
from sphere.ingest.storage.paths import TEMPORARY, checked, checked_prefix, is_temporary

COPY = 8 << 20  # bytes copied at a time when a file is cut
RECOVER_S = 120.0  # seconds to wait for lease recovery (HDFS needs 2 s as a rule)
ANSWER_S = 10.0  # seconds that a DataNode pipeline has to answer (a sync takes 2 to 30 ms as a rule)
SLOWEST = 4 << 20  # bytes per second: a longer write has more time
READER_S = 5.0  # seconds for which the block locations of a file are used again for ranges of it
_READERS = 64
_JOIN = 64 << 10  # buffers below this many bytes are joined before they cross into the client
_PERMISSION = 0o640
# Connection attempts with 0.5 s doubling to 3 s between them: 15 s in all, where the client's default is 3 minutes.
_CONFIG = {
    "dfs.client.failover.max.attempts": "6",
    "dfs.client.failover.sleep.base.millis": "500",
    "dfs.client.failover.sleep.max.millis": "3000",
}


class HdfsAppender(Appender):
    """A file open for append; `writer` None: it is closed and opened again by the next write."""

    def __init__(self, client: Client, path: str, writer: FileWriter | None, size: int) -> None:
        self._call = Deadline()
        self._client = client
        self._path = path
        self._writer = writer
        self._size = size
        self._synced = size

    def tell(self) -> int:
        return self._size

    def write(self, buffers: Sequence[Buffer]) -> None:
        with _told(f"writing {self._path}"):
            if self._writer is None:
                self._writer = self._client.append(self._path)
            size = sum(memoryview(buffer).nbytes for buffer in buffers)
            self._call(ANSWER_S + size / SLOWEST, _write_all, self._writer, buffers)
            self._size += size

    def sync(self) -> None:
        if self._writer is not None and self._synced != self._size:
            with _told(f"syncing {self._path}"):
                self._call(ANSWER_S, self._writer.hsync)
            self._synced = self._size

    def publish(self) -> None:
        self.sync()
        if self._writer is not None:
            with _told(f"closing {self._path}"):
                self._call(ANSWER_S, self._writer.close)
            self._writer = None

    def close(self) -> None:
        self.publish()
        self._call.end()

    def abandon(self) -> None:
        self._writer = None
        self._call.end()


class HdfsStorage(Storage):
    """Files below a folder of HDFS.

    `user` becomes HADOOP_USER_NAME of this process, where the client reads it at each connection. Ranges are read
    through kept block locations for up to 5 s, so a range of a file that another process replaced may be that old;
    bundles only grow.
    """

    def __init__(self, url: str, *, user: str = "") -> None:
        parts = urlsplit(url)
        self.url = url
        self._namenode = f"hdfs://{parts.netloc}"
        self._root = unquote(parts.path).rstrip("/")
        self._user = user
        self._lock = threading.Lock()
        self._connected: tuple[int, Client] | None = None  # (process id, client): a client does not survive a fork
        self._readers: OrderedDict[str, tuple[float, FileReader]] = OrderedDict()

    def create(self, path: str) -> HdfsAppender:
        full = self._path(path)
        with _told(f"creating {full}"):
            options = WriteOptions(create_parent=True, overwrite=False, permission=_PERMISSION)
            return HdfsAppender(self._client, full, self._client.create(full, options), 0)

    def append(self, path: str) -> HdfsAppender:
        full = self._path(path)
        with _told(f"opening {full} to append"):
            writer = self._client.append(full)
            return HdfsAppender(self._client, full, writer, self._client.get_file_info(full).length)

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        full = self._path(path)
        with _told(f"reading {full}"):
            reader = self._reader(full, None if length is None else offset + length)
            end = len(reader) if length is None else min(offset + length, len(reader))
            return reader.read_range(offset, end - offset) if end > offset else b""

    def write(self, path: str, data: bytes) -> None:
        full = self._path(path)
        with _told(f"writing {full}"):
            self._replace(full, [data])

    def rename(self, path: str, to: str) -> None:
        full, other = self._path(path), self._path(to)
        self._forget(full)
        self._forget(other)
        with _told(f"renaming {full}"):
            self._client.rename(full, other, False)

    def size(self, path: str) -> int:
        full = self._path(path)
        with _told(f"looking at {full}"):
            return self._client.get_file_info(full).length

    def exists(self, path: str) -> bool:
        full = self._path(path)
        with _told(f"looking at {full}"):
            try:
                return not self._client.get_file_info(full).isdir
            except FileNotFoundError:
                return False

    def walk(self, prefix: str = "") -> Iterator[Entry]:
        prefix = checked_prefix(prefix)
        folder = f"{self._root}/{prefix}".rstrip("/") or "/"
        cut = len(self._root) + 1
        with _told(f"listing {folder}"):
            try:
                found = [status for status in self._client.list_status(folder, True) if not status.isdir]
            except FileNotFoundError:
                return
        entries = [Entry(item.path[cut:], item.length, item.modification_time / 1000) for item in found]
        yield from sorted((entry for entry in entries if not is_temporary(entry.path)), key=lambda entry: entry.path)

    def truncate(self, path: str, size: int) -> None:
        full = self._path(path)
        with _told(f"cutting {full}"):
            reader = self._client.read(full)
            if size > len(reader):
                raise StorageError(f"cutting {full}: it is shorter than {size} bytes")
            if size < len(reader):  # the client has no truncate: the part to keep is copied and put in its place
                self._replace(full, (reader.read_range(at, min(COPY, size - at)) for at in range(0, size, COPY)))

    def recover(self, path: str) -> int:
        full = self._path(path)
        end = time.monotonic() + RECOVER_S
        with _told(f"recovering the lease of {full}"):
            while not self._client.recover_lease(full):
                if time.monotonic() > end:
                    raise StorageError(f"recovering the lease of {full}: not done after {RECOVER_S:.0f} s; try again")
                time.sleep(0.1)
            self._forget(full)
            return self._client.get_file_info(full).length

    def delete(self, path: str) -> None:
        full = self._path(path)
        self._forget(full)
        with _told(f"deleting {full}"):
            try:
                self._client.delete(full)
            except FileNotFoundError:
                return

    @property
    def _client(self) -> Client:
        connected = self._connected
        if connected is None or connected[0] != os.getpid():
            if self._user:
                os.environ["HADOOP_USER_NAME"] = self._user
            with _told(f"connecting to {self._namenode}"):
                connected = self._connected = (os.getpid(), Client(self._namenode, _CONFIG))
            self._readers = OrderedDict()
            self._lock = threading.Lock()
        return connected[1]

    def _path(self, path: str) -> str:
        return f"{self._root}/{checked(path)}"

    def _replace(self, full: str, pieces: Iterator[bytes] | list[bytes]) -> None:
        folder, _, name = full.rpartition("/")
        temporary = f"{folder}/.{name}.{secrets.token_hex(8)}{TEMPORARY}"
        writer = self._client.create(temporary, WriteOptions(create_parent=True, permission=_PERMISSION))
        appender = HdfsAppender(self._client, temporary, writer, 0)
        try:
            for piece in pieces:
                appender.write([piece])
            appender.close()
            self._client.rename(temporary, full, True)
        except BaseException:
            self._client.delete(temporary)
            raise
        finally:
            appender.abandon()
            self._forget(full)

    def _reader(self, full: str, end: int | None) -> FileReader:
        """A reader of the file; one of the last 5 s where it is long enough for `end`, None: the file as it is now."""
        client = self._client
        now = time.monotonic()
        with self._lock:
            kept = self._readers.get(full)
        if kept is not None and end is not None and now - kept[0] < READER_S and end <= len(kept[1]):
            return kept[1]
        reader = client.read(full)
        with self._lock:
            self._readers[full] = (now, reader)
            self._readers.move_to_end(full)
            while len(self._readers) > _READERS:
                self._readers.popitem(last=False)
        return reader

    def _forget(self, full: str) -> None:
        with self._lock:
            self._readers.pop(full, None)


def _write_all(writer: FileWriter, buffers: Sequence[Buffer]) -> None:
    for piece in _joined(buffers):
        writer.write(piece)


def _joined(buffers: Sequence[Buffer]) -> Iterator[Buffer]:
    """The buffers in order, neighbouring small ones as one."""
    small: list[Buffer] = []
    held = 0
    for buffer in buffers:
        size = memoryview(buffer).nbytes
        if size < _JOIN:
            small.append(buffer)
            held += size
        if small and (size >= _JOIN or held >= _JOIN):
            yield b"".join(small)
            small, held = [], 0
        if size >= _JOIN:
            yield buffer
    if held:
        yield b"".join(small)


@contextmanager
def _told(doing: str) -> Iterator[None]:
    """The one place where the client's errors become ours."""
    try:
        yield
    except FileNotFoundError as error:
        raise StorageMissing(f"{doing}: {_first_line(error)}") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise _error(error, doing) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a panic of the client's Rust code, which has no module to name
            raise
        raise _error(error, doing) from error


def _error(error: BaseException, doing: str) -> StorageError:
    message = f"{doing}: {_first_line(error)}"
    if "QuotaExceeded" in str(error) or "quota" in message.lower():
        return StorageFull(f"{message}; raise the quota or free some room, then send again")
    return StorageError(message)


def _first_line(error: BaseException) -> str:
    """The message without the NameNode's stack trace."""
    return str(error).partition("\n")[0] or type(error).__name__
