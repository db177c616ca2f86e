"""Storage on HDFS over HTTP (``webhdfs://NAMENODE:PORT/PATH``, PORT that of the NameNode's HTTP server or a gateway).

WebHDFS has no open stream and no hsync: `sync` sends what is buffered as one APPEND, after which the file is closed.
The bytes are then with every DataNode of the pipeline and readable by all, though not forced to their disks.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import requests
from hdfs.client import InsecureClient, _Request
from hdfs.util import HdfsError

from sphere.conf.errors import StorageError, StorageFull, StorageMissing
from sphere.ingest.storage.base import Appender, Buffer, Entry, Piece, Storage
from sphere.ingest.storage.paths import TEMPORARY, checked, checked_prefix, is_temporary, rewritten

FLUSH = 8 << 20  # bytes buffered before an APPEND is sent without waiting for `sync`
RECOVER_S = 120.0  # seconds to wait for a lease: HDFS lets go of a dead writer's after 60 s
_TIMEOUT_S = (10.0, 120.0)  # to connect, and between two reads of an answer
_PERMISSION = "640"

T = TypeVar("T")


class _Client(InsecureClient):  # type: ignore[misc]  # the package has no types
    _truncate = _Request("POST")  # the one operation of WebHDFS that the package leaves out


class WebHdfsAppender(Appender):
    """A file that grows by APPEND requests."""

    def __init__(self, client: Callable[[], _Client], path: str, size: int) -> None:
        self._client = client
        self._path = path
        self._size = size
        self._buffered: list[bytes] = []
        self._held = 0

    def tell(self) -> int:
        return self._size

    def write(self, buffers: Sequence[Buffer]) -> None:
        for buffer in buffers:
            data = bytes(buffer)
            self._buffered.append(data)
            self._held += len(data)
            self._size += len(data)
            if self._held >= FLUSH:
                self.sync()

    def sync(self) -> None:
        if self._held:
            data = b"".join(self._buffered)
            self._buffered, self._held = [], 0
            with _told(f"appending to {self._path}"):
                self._client().write(self._path, data=data, append=True)
                length = int(self._client().status(self._path)["length"])
            if length != self._size:  # another host took this process for dead, and ended the file before
                raise StorageError(f"{self._path} has {length} bytes where {self._size} were written: not by this host")

    def publish(self) -> None:
        self.sync()

    def close(self) -> None:
        self.sync()

    def abandon(self) -> None:
        self._buffered, self._held = [], 0


class WebHdfsStorage(Storage):
    """Files below a folder of HDFS; `user` is sent as user.name, empty: the login name."""

    synced_is_shown = True

    def __init__(self, url: str, *, user: str = "") -> None:
        parts = urlsplit(url)
        self.url = url
        self._address = f"http://{parts.netloc}"
        self._root = unquote(parts.path).rstrip("/")
        self._user = user or None
        self._of_thread = threading.local()  # an HTTP session serves one thread

    def create(self, path: str, attempt: int = 0) -> WebHdfsAppender:
        full = self._path(path)
        with _told(f"creating {full}"):
            self._client().write(full, data=b"", permission=_PERMISSION)
        return WebHdfsAppender(self._client, full, 0)

    def append(self, path: str) -> WebHdfsAppender:
        return WebHdfsAppender(self._client, self._path(path), self.size(path))

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        full = self._path(path)
        if length == 0 and self.size(path) >= 0:
            return b""
        with _told(f"reading {full}"):
            try:
                with self._client().read(full, offset=offset, length=length) as answer:
                    data: bytes = answer.read()
                    promised = answer.headers.get("Content-Length")
            except HdfsError as error:
                if "out of the range" in str(error):  # an offset after the end
                    return b""
                raise
        if promised is not None and len(data) != int(promised):
            raise StorageError(f"reading {full}: {len(data)} bytes came where {promised} were promised")
        return data

    def write(self, path: str, data: bytes, *, durable: bool = True) -> None:
        full = self._path(path)
        folder, _, name = full.rpartition("/")
        temporary = f"{folder}/.{name}.{secrets.token_hex(8)}{TEMPORARY}"
        with _told(f"writing {full}"):
            client = self._client()
            try:
                client.write(temporary, data=data, permission=_PERMISSION)
                client._rename(temporary, destination=full, renameoptions="OVERWRITE")
            except BaseException:
                client.delete(temporary)
                raise

    def rewrite(self, path: str, pieces: Callable[[], Iterable[Piece]], *, check: Callable[[str], None]) -> int:
        temporary = rewritten(path)
        self.delete(temporary)  # of a process that was killed
        try:
            appender = self.create(temporary)
            for piece in pieces():
                for data in [piece] if isinstance(piece, bytes) else _zeros(piece):
                    appender.write([data])
            appender.close()
            check(temporary)
            with _told(f"putting {temporary} in the place of {path}"):
                full = self._path(path)
                self._client()._rename(self._path(temporary), destination=full, renameoptions="OVERWRITE")
        except BaseException:
            self.delete(temporary)
            raise
        return 0

    def rename(self, path: str, to: str) -> None:
        full, other = self._path(path), self._path(to)
        with _told(f"renaming {full}"):
            self._client()._rename(full, destination=other, renameoptions="NONE")

    def size(self, path: str) -> int:
        full = self._path(path)
        with _told(f"looking at {full}"):
            return int(self._client().status(full)["length"])

    def exists(self, path: str) -> bool:
        full = self._path(path)
        with _told(f"looking at {full}"):
            status = self._client().status(full, strict=False)
        return status is not None and status["type"] == "FILE"

    def walk(self, prefix: str = "", *, enter: Callable[[Entry], bool] | None = None) -> Iterator[Entry]:
        prefix = checked_prefix(prefix)
        found = list(self._list(prefix, enter))
        yield from sorted((entry for entry in found if not is_temporary(entry.path)), key=lambda entry: entry.path)

    def _list(self, folder: str, enter: Callable[[Entry], bool] | None) -> Iterator[Entry]:
        full = f"{self._root}/{folder}".rstrip("/") or "/"
        try:
            with _told(f"listing {full}"):
                items: list[tuple[str, dict[str, Any]]] = self._client().list(full, status=True)
        except StorageMissing:
            return
        for name, status in items:
            path, changed = f"{folder}/{name}" if folder else name, status["modificationTime"] / 1000
            if status["type"] != "DIRECTORY":
                yield Entry(path, int(status["length"]), changed)
            elif enter is None or enter(Entry(path, 0, changed)):
                yield from self._list(path, enter)

    def truncate(self, path: str, size: int) -> None:
        full = self._path(path)
        now = self.size(path)
        if size > now:
            raise StorageError(f"cutting {full}: it is shorter than {size} bytes")
        if size < now:
            with _told(f"cutting {full}"):
                self._when_free(full, lambda client: client._truncate(full, newlength=size))
            self.recover(path)  # the NameNode cuts inside a block by lease recovery

    def recover(self, path: str) -> int:
        full = self._path(path)
        with _told(f"recovering the lease of {full}"):
            self._when_free(full, lambda client: client.write(full, data=b"", append=True))
        return self.size(path)

    def delete(self, path: str) -> None:
        full = self._path(path)
        with _told(f"deleting {full}"):
            self._client().delete(full)

    def _when_free(self, full: str, ask: Callable[[_Client], T]) -> T:
        """What `ask` gives, asked again while another writer's lease or its recovery stands in the way."""
        end = time.monotonic() + RECOVER_S
        while True:
            try:
                return ask(self._client())
            except HdfsError as error:
                if error.exception not in _LEASED:
                    raise
                if time.monotonic() > end:
                    raise StorageError(f"{full}: its lease is not free after {RECOVER_S:.0f} s; try again") from error
            time.sleep(0.25)

    def _client(self) -> _Client:
        client: _Client | None = getattr(self._of_thread, "client", None)
        if client is None:
            logging.getLogger("hdfs.client").setLevel(logging.WARNING)  # it names every request
            client = self._of_thread.client = _Client(self._address, user=self._user, timeout=_TIMEOUT_S)
        return client

    def _path(self, path: str) -> str:
        return f"{self._root}/{checked(path)}"


def _zeros(count: int) -> Iterator[bytes]:
    for at in range(0, count, FLUSH):
        yield bytes(min(FLUSH, count - at))


_LEASED = {"AlreadyBeingCreatedException", "RecoveryInProgressException"}


@contextmanager
def _told(doing: str) -> Iterator[None]:
    """The one place where the errors of the package and of HTTP become ours."""
    try:
        yield
    except HdfsError as error:
        message = f"{doing}: {str(error).partition(chr(10))[0]}"
        if error.exception == "FileNotFoundException":
            raise StorageMissing(message) from error
        if "QuotaExceeded" in (error.exception or ""):
            raise StorageFull(f"{message}; raise the quota or free some room, then send again") from error
        raise StorageError(message) from error
    except (requests.RequestException, OSError) as error:
        raise StorageError(f"{doing}: {error}") from error
