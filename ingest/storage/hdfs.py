"""Storage on HDFS over its native protocol (``hdfs://NAMENODE:PORT/PATH``, also a name service of HADOOP_CONF_DIR).

An open file's last block cannot be read by this client, so what was synced is durable but hidden until `publish`, which
closes the file; the next write opens it again.

A pipeline that has worked survives the death of a DataNode as a rule (the client goes on with the others), though a
sync that is under way may wait without end. One that is being set up does not: the NameNode offers a dead node until it
takes it for dead (10 minutes by default), the client does not ask for another one, and waits without end where the dead
node is not the first. So a sync has little time, the first of a pipeline less, and the same bytes go into another file,
with fewer copies when that fails as well; HDFS makes the others once it can.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any
from urllib.parse import unquote, urlsplit

from hdfs_native import Client, FileReader, FileStatus, FileWriter, WriteOptions

from sphere.conf.errors import StorageAway, StorageError, StorageFull, StorageMissing
from sphere.ingest.storage.base import Appender, Buffer, Entry, Piece, Storage
from sphere.ingest.storage.deadline import Deadline
from sphere.ingest.storage.namenode import NameNode, namenode
from sphere.ingest.storage.paths import TEMPORARY, checked, checked_prefix, is_temporary, rewritten

COPY = 8 << 20  # bytes copied at a time when a file is cut
RECOVER_S = 120.0  # seconds to wait for lease recovery (HDFS needs 2 s as a rule)
ANSWER_S = 10.0  # seconds that a DataNode pipeline has to answer where nothing else can be done
SYNC_S = 3.0  # seconds that a sync may take (2 to 30 ms as a rule); then the bytes go into another file
FRESH_S = 1.5  # seconds that a pipeline has for its first sync where the bytes can go into another file
APPENDS = 3  # attempts to open a file to append
APPEND_PAUSE_S = 0.1  # seconds between them
READ_S = 10.0  # seconds that DataNodes have for a range, besides those that its size takes
RELEASE_S = 3.0  # seconds for the lease of one that failed
SLOWEST = 4 << 20  # bytes per second: a longer write has more time
READER_S = 5.0  # seconds for which the block locations of a file are used again for ranges of it
_READERS = 64
_LISTED = 128  # entries taken from a list at a time
_JOIN = 1 << 18  # bytes up to which buffers are joined on their way into the client; 1 MiB is fresh memory each time
_PERMISSION = 0o640
log = logging.getLogger(__name__)


Ask = Callable[..., Any]
"""`HdfsStorage._ask`."""


class HdfsAppender(Appender):
    """A file open for append; `patience_s` are the seconds that its pipeline has for the first sync.

    With `copies` the file gets that many once the first sync was good: it was created with fewer.
    """

    def __init__(
        self, ask: Ask, path: str, writer: FileWriter, size: int, *, patience_s: float, copies: int = 0
    ) -> None:
        self._call = Deadline()
        self._patience_s = patience_s
        self._copies = copies
        self._ask = ask
        self._path = path
        self._writer: FileWriter | None = writer  # None: closed, opened again by the next write
        self._size = size
        self._synced = size

    def tell(self) -> int:
        return self._size

    def write(self, buffers: Sequence[Buffer]) -> None:
        with _told(f"writing {self._path}"):
            self._reopen()
            size = sum(memoryview(buffer).nbytes for buffer in buffers)
            self._call(self._patience_s + size / SLOWEST, _write_all, self._writer, buffers)
            self._size += size

    def _reopen(self) -> None:
        """Another host may have taken this process for dead while the file was closed, and ended it."""
        if self._writer is None:
            self._writer = self._ask(lambda client: client.append(self._path), changes=self._path)
            self._patience_s = FRESH_S
            length = self._ask(lambda client: client.get_file_info(self._path)).length
            if length != self._size:
                raise StorageError(f"{self._path} has {length} bytes where {self._size} were written: not by this host")

    def prepare(self) -> None:
        """Have it open, and its pipeline at work."""
        if self._writer is None:
            with _told(f"opening {self._path} to append"):
                self._reopen()
            self.probe()

    def sync(self) -> None:
        if self._writer is not None and self._synced != self._size:
            with _told(f"syncing {self._path}"):
                self._call(self._patience_s, self._writer.hsync)
                self._synced, self._patience_s = self._size, SYNC_S
                if self._copies:
                    self._ask(lambda client: client.set_replication(self._path, self._copies))
                    self._copies = 0

    def probe(self) -> None:
        """Sync nothing: a DataNode that has not finished with a block closed just now says so before there is data."""
        if self._writer is not None:
            with _told(f"opening {self._path} to append"):
                self._call(self._patience_s, self._writer.hsync)

    def publish(self) -> None:
        self._close(SYNC_S)

    def close(self) -> None:
        self._close(ANSWER_S)
        self._call.end()

    def _close(self, limit_s: float) -> None:
        self.sync()
        if self._writer is not None:
            with _told(f"closing {self._path}"):
                self._call(limit_s, self._writer.close)
            self._writer = None

    def abandon(self) -> None:
        """Its destructor would close the file, and wait for dead DataNodes without end: it is closed here, which lets
        go of the lease that a repair would have to wait for, or not at all."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with suppress(Exception):  # whatever is wrong with it, it is given up
                self._call(FRESH_S, writer.close)
            writer.close = lambda: None  # type: ignore[method-assign]
        self._call.end()


class HdfsStorage(Storage):
    """Files below a folder of HDFS.

    `user` becomes HADOOP_USER_NAME of this process, where the client reads it at each connection. Ranges are read
    through kept block locations for up to 5 s, so a range of a file that another process replaced may be that old;
    bundles only grow.
    """

    attempts = 32  # a dead node that is first in a pipeline is noticed within some ms, a later one after FRESH_S

    def __init__(self, url: str, *, user: str = "") -> None:
        parts = urlsplit(url)
        self.url = url
        self._namenode_url = f"hdfs://{parts.netloc}"
        self._root = unquote(parts.path).rstrip("/")
        self._user = user
        self._copies = 0  # of a file by default, 0: not known yet
        self._lock = threading.Lock()
        self._connected: tuple[int, int, Client] | None = None  # (process id, outages before it was made, client)
        self._readers: OrderedDict[str, tuple[float, FileReader]] = OrderedDict()

    def create(self, path: str, attempt: int = 0) -> HdfsAppender:
        return self._create(self._path(path), attempt)

    def append(self, path: str) -> HdfsAppender:
        full = self._path(path)
        for left in reversed(range(APPENDS)):
            with _told(f"opening {full} to append"):
                writer = self._ask(lambda client: client.append(full), changes=full)
                size = self._ask(lambda client: client.get_file_info(full)).length
            appender = HdfsAppender(self._ask, full, writer, size, patience_s=ANSWER_S)
            try:
                appender.probe()
                break
            except StorageError as error:
                appender.abandon()
                dead = isinstance(error.__cause__, TimeoutError)  # another attempt would wait as long
                if dead or not left or not self._let_go(full, RELEASE_S):
                    raise
                log.warning("once more: %s", error)
            time.sleep(APPEND_PAUSE_S)
        return appender

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        full = self._path(path)
        with _told(f"reading {full}"):
            reader, kept = self._reader(full, None if length is None else offset + length)
            try:
                return self._range(reader, offset, length)
            except TimeoutError:  # another attempt would wait as long
                raise
            except Exception:
                if not kept:
                    raise
        self._forget(full)  # another process put a new file in its place, and the blocks of the old one are gone
        with _told(f"reading {full}"):
            return self._range(self._reader(full, None)[0], offset, length)

    def write(self, path: str, data: bytes, *, durable: bool = True) -> None:
        full = self._path(path)
        with _told(f"writing {full}"):
            self._replace(full, lambda: [data])

    def rewrite(self, path: str, pieces: Callable[[], Iterable[Piece]], *, check: Callable[[str], None]) -> int:
        full, temporary = self._path(path), rewritten(path)
        for left in reversed(range(self.attempts)):
            self.delete(temporary)  # of a process that was killed
            try:
                self._fill(self._path(temporary), _written_out(pieces()), self.attempts - 1 - left)
                break
            except StorageError as error:
                if not left or isinstance(error, (StorageFull, StorageAway)):
                    raise
                log.warning("once more, in another file: %s", error)
        try:
            check(temporary)
            with _told(f"putting {temporary} in the place of {full}"):
                self._ask(lambda client: client.rename(self._path(temporary), full, True), changes=full)
        except BaseException:
            self.delete(temporary)
            raise
        finally:
            self._forget(full)
            self._forget(self._path(temporary))
        return 0

    def _fill(self, full: str, pieces: Iterable[bytes], attempt: int) -> None:
        appender = self._create(full, attempt)
        try:
            for piece in pieces:
                appender.write([piece])
            appender.close()
        finally:
            appender.abandon()

    def rename(self, path: str, to: str) -> None:
        full, other = self._path(path), self._path(to)
        self._forget(full)
        self._forget(other)
        with _told(f"renaming {full}"):
            self._ask(lambda client: client.rename(full, other, False), changes=full)

    def size(self, path: str) -> int:
        full = self._path(path)
        with _told(f"looking at {full}"):
            length: int = self._ask(lambda client: client.get_file_info(full)).length
            return length

    def exists(self, path: str) -> bool:
        full = self._path(path)
        with _told(f"looking at {full}"):
            try:
                return not self._ask(lambda client: client.get_file_info(full)).isdir
            except FileNotFoundError:
                return False

    def walk(self, prefix: str = "", *, enter: Callable[[Entry], bool] | None = None) -> Iterator[Entry]:
        prefix = checked_prefix(prefix)
        entries = self._list(f"{self._root}/{prefix}".rstrip("/") or "/", enter)
        yield from sorted((entry for entry in entries if not is_temporary(entry.path)), key=lambda entry: entry.path)

    def _list(self, folder: str, enter: Callable[[Entry], bool] | None) -> list[Entry]:
        """The files below a folder: with one call (of the client), or folder by folder."""
        with _told(f"listing {folder}"):
            try:
                listed = self._ask(lambda client: client.list_status(folder, enter is None))
                found: list[FileStatus] = []
                while some := self._ask(lambda _: list(islice(listed, _LISTED))):
                    found += some
            except FileNotFoundError:
                return []
        entries: list[Entry] = []
        for item in found:
            entry = Entry(item.path[len(self._root) + 1 :], item.length, item.modification_time / 1000)
            if not item.isdir:
                entries.append(entry)
            elif enter is not None and enter(Entry(entry.path, 0, entry.mtime)):
                entries += self._list(f"{self._root}/{entry.path}", enter)
        return entries

    def truncate(self, path: str, size: int) -> None:
        full = self._path(path)
        with _told(f"cutting {full}"):
            reader = self._ask(lambda client: client.read(full))
            if size > len(reader):
                raise StorageError(f"cutting {full}: it is shorter than {size} bytes")
            if size < len(reader):  # the client has no truncate: the part to keep is copied and put in its place
                kept = [(at, min(COPY, size - at)) for at in range(0, size, COPY)]
                self._replace(full, lambda: (self._range(reader, *part) for part in kept))

    def recover(self, path: str) -> int:
        full = self._path(path)
        if not self._let_go(full, RECOVER_S):
            raise StorageError(f"recovering the lease of {full}: not done after {RECOVER_S:.0f} s; try again")
        with _told(f"looking at {full}"):
            length: int = self._ask(lambda client: client.get_file_info(full)).length
            return length

    def _let_go(self, full: str, within_s: float) -> bool:
        """Have nobody write to the file any more; whether that was done in time."""
        end = time.monotonic() + within_s
        with _told(f"recovering the lease of {full}"):
            while not self._ask(lambda client: client.recover_lease(full), changes=full):
                if time.monotonic() > end:
                    return False
                time.sleep(0.1)
        self._forget(full)
        return True

    def delete(self, path: str) -> None:
        full = self._path(path)
        self._forget(full)
        with _told(f"deleting {full}"):
            try:
                self._ask(lambda client: client.delete(full), changes=full)
            except FileNotFoundError:
                return

    @property
    def _namenode(self) -> NameNode:
        return namenode(self._namenode_url, self._user)

    def _ask(self, call: Callable[[Client], Any], *, changes: str = "") -> Any:
        """What `call` gives of the client; see NameNode."""
        return self._namenode.ask(call, self._client, changes=changes)

    @property
    def _client(self) -> Client:
        connected, of_now = self._connected, (os.getpid(), self._namenode.outages)
        if connected is None or connected[:2] != of_now:
            with _told(f"connecting to {self._namenode_url}"):
                connected = self._connected = (*of_now, self._namenode.connect())
            self._readers = OrderedDict()
            self._lock = threading.Lock()
        return connected[2]

    def _path(self, path: str) -> str:
        return f"{self._root}/{checked(path)}"

    def _create(self, full: str, attempt: int) -> HdfsAppender:
        """A new file: with all copies at first and once more, then with one less, then with one."""
        with _told(f"creating {full}"):
            copies = None if attempt < 2 else max(1, self._copies - 1) if attempt == 2 else 1
            options = WriteOptions(create_parent=True, overwrite=False, permission=_PERMISSION, replication=copies)
            writer = self._ask(lambda client: client.create(full, options), changes=full)
            if not self._copies:
                self._copies = self._ask(lambda client: client.get_file_info(full)).replication or 1
            wanted = self._copies if copies else 0
            patience_s = FRESH_S if attempt < 3 else 2 * FRESH_S
            return HdfsAppender(self._ask, full, writer, 0, patience_s=patience_s, copies=wanted)

    def _replace(self, full: str, pieces: Callable[[], Iterable[bytes]]) -> None:
        """Put these bytes in the place of the file; `pieces` gives them, for each attempt anew."""
        for left in reversed(range(self.attempts)):
            try:
                self._replace_once(full, pieces(), self.attempts - 1 - left)
                return
            except StorageError as error:
                if not left or isinstance(error, (StorageFull, StorageAway)):
                    raise
                log.warning("once more, in another file: %s", error)

    def _replace_once(self, full: str, pieces: Iterable[bytes], attempt: int) -> None:
        folder, _, name = full.rpartition("/")
        temporary = f"{folder}/.{name}.{secrets.token_hex(8)}{TEMPORARY}"
        try:
            self._fill(temporary, pieces, attempt)
            self._ask(lambda client: client.rename(temporary, full, True), changes=full)
        except BaseException:
            self._ask(lambda client: client.delete(temporary), changes=temporary)
            raise
        finally:
            self._forget(full)

    def _reader(self, full: str, end: int | None) -> tuple[FileReader, bool]:
        """A reader of the file, and whether it is one of the last 5 s: where that is long enough for `end`; None: the
        file as it is now."""
        client = self._client  # forgets the readers of another one
        now = time.monotonic()
        with self._lock:
            kept = self._readers.get(full)
        if kept is not None and end is not None and now - kept[0] < READER_S and end <= len(kept[1]):
            return kept[1], True
        reader = self._namenode.ask(client.read, full)
        with self._lock:
            self._readers[full] = (now, reader)
            self._readers.move_to_end(full)
            while len(self._readers) > _READERS:
                self._readers.popitem(last=False)
        return reader, False

    def _range(self, reader: FileReader, offset: int, length: int | None) -> bytes:
        size = (len(reader) if length is None else min(offset + length, len(reader))) - offset
        if size <= 0:
            return b""
        return self._namenode.limited(READ_S + size / SLOWEST, reader.read_range, offset, size)

    def _forget(self, full: str) -> None:
        with self._lock:
            self._readers.pop(full, None)


def _written_out(pieces: Iterable[Piece]) -> Iterator[bytes]:
    """The pieces, with zeros as bytes."""
    for piece in pieces:
        if isinstance(piece, int):
            for at in range(0, piece, COPY):
                yield bytes(min(COPY, piece - at))
        else:
            yield piece


def _write_all(writer: FileWriter, buffers: Sequence[Buffer]) -> None:
    for piece in _joined(buffers):
        writer.write(piece)


def _joined(buffers: Sequence[Buffer]) -> Iterator[bytes]:
    """The buffers in order, as bytes of about _JOIN: the client takes a memoryview byte by byte (7 ms for 512 kB)."""
    waiting: list[Buffer] = []
    held = 0
    for buffer in buffers:
        waiting.append(buffer)
        held += memoryview(buffer).nbytes
        if held >= _JOIN:
            yield b"".join(waiting)
            waiting, held = [], 0
    if held:
        yield b"".join(waiting)


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
