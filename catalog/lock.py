"""Who writes the catalog: at most one process at a time, and the others learn which one it is.

A local catalog is guarded by ``flock`` on ``<catalog>/_writer.lock``: the kernel lets go of it when the holder dies.
On HDFS the file ``<catalog>/_writer/lock`` itself is the lock: created exclusively, its owner's heartbeat renewed in
it, and taken over when the owner is a dead process of this host or its heartbeat is older than STALE_S.
"""

from __future__ import annotations

import fcntl
import os
import socket
import threading
import time
import uuid
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit

import orjson

from sphere.conf.errors import LockHeld, SphereError, StorageError, StorageMissing
from sphere.conf.settings import Settings
from sphere.ingest.storage import open_storage
from sphere.ingest.storage.base import Storage

FLOCK_NAME = "_writer.lock"
LOCK_FOLDER = "_writer"
LOCK_PATH = f"{LOCK_FOLDER}/lock"
STALE_S = 120.0
"""Seconds without a heartbeat after which a lock on HDFS is taken over."""
HEARTBEAT_S = 10.0
"""Seconds between two heartbeats of a lock on HDFS."""
POLL_S = 0.2
"""Seconds between two attempts to take a lock that is held."""


@dataclass(frozen=True, slots=True)
class Owner:
    """What a lock file says of its holder; ``since`` and ``heartbeat`` are RFC 3339 in UTC."""

    host: str
    pid: int
    job: str
    since: str
    token: str
    heartbeat: str

    @classmethod
    def here(cls, job: str) -> Owner:
        """This process, now."""
        now = _now()
        return cls(socket.gethostname(), os.getpid(), job, now, uuid.uuid4().hex, now)

    def to_json(self) -> bytes:
        """The owner as one JSON object."""
        return orjson.dumps(asdict(self))

    @classmethod
    def from_json(cls, data: bytes) -> Owner | None:
        """The owner that a lock file names, or None where it is half written."""
        try:
            return cls(**orjson.loads(data))
        except (ValueError, TypeError):
            return None

    def is_gone(self) -> bool:
        """Whether the holder is surely dead: a pid of this host that is no more, or a heartbeat too old."""
        if self.host == socket.gethostname():
            return not _runs(self.pid)
        age = datetime.now(timezone.utc) - datetime.fromisoformat(self.heartbeat)
        return age.total_seconds() > STALE_S


class CatalogLock:
    """The right to write the catalog, as a context manager.

    Waits up to ``settings.extract.lock_wait_s`` seconds, then raises LockHeld naming the holder's job, process, host
    and since when. Not reentrant.
    """

    def __init__(self, settings: Settings, *, job: str = "extract") -> None:
        self._wait_s = settings.extract.lock_wait_s
        self._owner = Owner.here(job)
        root = settings.catalog_root
        self._guard: _Guard
        if urlsplit(root).scheme == "file":
            self._guard = _FlockGuard(Path(unquote(urlsplit(root).path)) / FLOCK_NAME)
        else:
            self._guard = _FileGuard(open_storage(root, user=settings.storage.user))

    def __enter__(self) -> CatalogLock:
        deadline = time.monotonic() + self._wait_s
        while not self._guard.take(self._owner):
            if time.monotonic() >= deadline:
                raise LockHeld(_explain(self._guard.holder()))
            time.sleep(POLL_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._guard.release(self._owner)

    def check(self) -> None:
        """Raise LockHeld when the lock was lost: this process stood still so long that another one took it over."""
        holder = self._guard.holder()
        if holder is None or holder.token != self._owner.token:
            raise LockHeld(f"the right to write the catalog was lost; {_explain(holder)}")


class _Guard(ABC):
    """One way to hold a lock."""

    @abstractmethod
    def take(self, owner: Owner) -> bool:
        """Try once; False when another holds it."""

    @abstractmethod
    def holder(self) -> Owner | None:
        """Who holds it, as far as the lock file says."""

    @abstractmethod
    def release(self, owner: Owner) -> None:
        """Let go."""


class _FlockGuard(_Guard):
    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def take(self, owner: Owner) -> bool:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        os.ftruncate(fd, 0)
        os.pwrite(fd, owner.to_json(), 0)
        self._fd = fd
        return True

    def holder(self) -> Owner | None:
        try:
            return Owner.from_json(self._path.read_bytes())
        except FileNotFoundError:
            return None

    def release(self, owner: Owner) -> None:
        os.ftruncate(self._fd, 0)
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        os.close(self._fd)


class _FileGuard(_Guard):
    """A lock file on a storage that has no flock.

    Only one process can take over a given dead owner: it first creates a file named by that owner's token.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._done = threading.Event()
        self._beat: threading.Thread | None = None

    def take(self, owner: Owner) -> bool:
        if not self._create(LOCK_PATH, owner):
            holder = self.holder()
            if holder is None or not holder.is_gone() or not self._take_over(holder, owner):
                return False
        self._beat = threading.Thread(target=self._heartbeat, args=(owner,), name="catalog-lock", daemon=True)
        self._beat.start()
        return True

    def _create(self, path: str, owner: Owner) -> bool:
        """Create the file exclusively, or say that it is there."""
        if self._storage.exists(path):
            return False
        try:
            appender = self._storage.create(path)
        except StorageError:
            if self._storage.exists(path):
                return False
            raise
        appender.write([owner.to_json()])
        appender.close()
        return True

    def _take_over(self, dead: Owner, owner: Owner) -> bool:
        claim = f"{LOCK_FOLDER}/{dead.token}"
        if not self._create(claim, owner):
            claimant = self._read(claim)
            if claimant is not None and claimant.is_gone():
                self._storage.delete(claim)
            return False
        try:
            current = self.holder()
            if current is None or current.token != dead.token:
                return False
            self._storage.write(LOCK_PATH, owner.to_json())
            return True
        finally:
            self._storage.delete(claim)

    def holder(self) -> Owner | None:
        return self._read(LOCK_PATH)

    def _read(self, path: str) -> Owner | None:
        try:
            return Owner.from_json(self._storage.read(path)) or self._unnamed(path)
        except StorageMissing:
            return None

    def _unnamed(self, path: str) -> Owner | None:
        """The owner of a file that was created and not yet written, or never: as old as the file."""
        for entry in self._storage.walk(LOCK_FOLDER):
            if entry.path == path:
                created = datetime.fromtimestamp(entry.mtime, timezone.utc).isoformat(timespec="seconds")
                return Owner("?", 0, "a job", created, f"unnamed-{entry.mtime}", created)
        return None

    def _heartbeat(self, owner: Owner) -> None:
        while not self._done.wait(HEARTBEAT_S):
            with suppress(SphereError):  # a storage that is away now is asked again at the next beat
                holder = self.holder()
                if holder is None or holder.token != owner.token:
                    return
                self._storage.write(LOCK_PATH, replace(owner, heartbeat=_now()).to_json())

    def release(self, owner: Owner) -> None:
        self._done.set()
        if self._beat is not None:
            self._beat.join()
        holder = self.holder()
        if holder is not None and holder.token == owner.token:
            self._storage.delete(LOCK_PATH)


def _explain(holder: Owner | None) -> str:
    if holder is None:
        return "another process is writing the catalog; try again when it has finished"
    return (
        f"the catalog is being written by {holder.job} (process {holder.pid} on {holder.host}, since {holder.since}); "
        "try again when it has finished"
    )


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, as somebody else
        return True
    return True


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
