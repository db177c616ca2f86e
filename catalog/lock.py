"""Who writes the catalog: at most one process at a time, and the others learn which one it is. Of what was deleted, who
decides whether it comes back or goes for good, in the same way.

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
from typing import TypeVar
from urllib.parse import unquote, urlsplit

import orjson

from sphere.conf.errors import LockHeld, SphereError, StorageError, StorageMissing
from sphere.conf.private import make_private
from sphere.conf.settings import Settings
from sphere.ingest.storage import open_storage
from sphere.ingest.storage.base import Storage
from sphere.ingest.storage.local import LocalStorage

FLOCK_NAME = "_writer.lock"
LOCK_FOLDER = "_writer"
LOCK_PATH = f"{LOCK_FOLDER}/lock"
STALE_S = 120.0
"""Seconds without a heartbeat after which a lock on HDFS is taken over."""
HEARTBEAT_S = 10.0
"""Seconds between two heartbeats of a lock on HDFS."""
FATE = "_tombstones"
FATE_WAIT_S = 60.0
"""Seconds to wait for who writes the tombstones: some ms, on HDFS a second or two."""
POLL_S = 0.2
"""Seconds between two attempts to take a lock that is held."""


Held = TypeVar("Held", bound="Lock")


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


class Lock:
    """A right that one process has at a time, as a context manager.

    Waits up to `wait_s` seconds, then raises LockHeld naming the holder's job, process, host and since when; `what` it
    is doing completes the sentence. Not reentrant.
    """

    def __init__(self, guard: _Guard, *, job: str, what: str, wait_s: float) -> None:
        self._guard, self._what, self._wait_s = guard, what, wait_s
        self._owner = Owner.here(job)

    def __enter__(self: Held) -> Held:
        deadline = time.monotonic() + self._wait_s
        while not self._guard.take(self._owner):
            if time.monotonic() >= deadline:
                raise LockHeld(self._explain(self._guard.holder()))
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
            raise LockHeld(f"the right to write {self._what} was lost; {self._explain(holder)}")

    def _explain(self, holder: Owner | None) -> str:
        if holder is None:
            return f"another process is writing {self._what}; try again when it has finished"
        verb = "are" if self._what.endswith("s") else "is"
        return (
            f"{self._what} {verb} being written by {holder.job} (process {holder.pid} on {holder.host}, "
            f"since {holder.since}); try again when it has finished"
        )


class CatalogLock(Lock):
    """The right to write the catalog; waits for it up to ``settings.extract.lock_wait_s`` seconds."""

    def __init__(self, settings: Settings, *, job: str = "extract") -> None:
        root = settings.catalog_root
        guard: _Guard
        if urlsplit(root).scheme == "file":
            guard = _FlockGuard(Path(unquote(urlsplit(root).path)) / FLOCK_NAME)
        else:
            guard = _FileGuard(open_storage(root, user=settings.storage.user))
        super().__init__(guard, job=job, what="the catalog", wait_s=settings.extract.lock_wait_s)


class FateLock(Lock):
    """The right to say of deleted instances that they come back, or that their bytes go."""

    def __init__(self, storage: Storage, *, job: str) -> None:
        guard: _Guard
        if isinstance(storage, LocalStorage):
            guard = _FlockGuard(storage.root / f"{FATE}.lock")
        else:
            guard = _FileGuard(storage, FATE)
        super().__init__(guard, job=job, what="the tombstones", wait_s=FATE_WAIT_S)


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
        make_private(self._path.parent)
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

    def __init__(self, storage: Storage, folder: str = LOCK_FOLDER) -> None:
        self._storage = storage
        self._folder, self._path = folder, f"{folder}/lock"
        self._done = threading.Event()
        self._beat: threading.Thread | None = None

    def take(self, owner: Owner) -> bool:
        if not self._create(self._path, owner):
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
        claim = f"{self._folder}/{dead.token}"
        if not self._create(claim, owner):
            claimant = self._read(claim)
            if claimant is not None and claimant.is_gone():
                self._storage.delete(claim)
            return False
        try:
            current = self.holder()
            if current is None or current.token != dead.token:
                return False
            self._storage.write(self._path, owner.to_json())
            return True
        finally:
            self._storage.delete(claim)

    def holder(self) -> Owner | None:
        return self._read(self._path)

    def _read(self, path: str) -> Owner | None:
        try:
            return Owner.from_json(self._storage.read(path)) or self._unnamed(path)
        except StorageMissing:
            return None

    def _unnamed(self, path: str) -> Owner | None:
        """The owner of a file that was created and not yet written, or never: as old as the file."""
        for entry in self._storage.walk(self._folder):
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
                self._storage.write(self._path, replace(owner, heartbeat=_now()).to_json())

    def release(self, owner: Owner) -> None:
        self._done.set()
        if self._beat is not None:
            self._beat.join()
        holder = self.holder()
        if holder is not None and holder.token == owner.token:
            self._storage.delete(self._path)


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
