"""The spool: bundles on a disk of this host that are shipped to the storage (``ingest.durability = "spool"``).

It is a storage like any other, with locks of its own: the same writer, journal and recovery work on it. A bundle has
the same path, the same bytes and the same journal here and on the storage, so that whatever is known by its path stays
known while it moves. See docs/decisions/0016-spool.md.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from sphere.conf.errors import StorageFull, StorageMissing
from sphere.conf.settings import Settings
from sphere.ingest.bundle import BundleWriter, NewMember
from sphere.ingest.folders import BUNDLES
from sphere.ingest.journal import bundle_id
from sphere.ingest.records import MemberRecord
from sphere.ingest.recovery import RecoveryReport, recover
from sphere.ingest.storage import Entry, Readable, open_storage
from sphere.ingest.storage.local import LocalStorage

LOOK_S = 1.0  # seconds for which a look at how full the spool is holds; other receivers may fill it meanwhile


def in_use(settings: Settings) -> bool:
    """Whether instances are spooled, or were and some are not shipped yet."""
    return settings.ingest.durability == "spool" or (settings.ingest.spool_dir / BUNDLES).is_dir()


def spool_storage(settings: Settings) -> LocalStorage:
    """The spool as a storage; nothing is made before it is written to."""
    return LocalStorage(settings.ingest.spool_dir)


def spool_settings(settings: Settings) -> Settings:
    """Settings for who writes to the spool or recovers it: its locks are not those of the storage."""
    archive = settings.archive.model_copy(update={"state_dir": settings.ingest.spool_dir})
    return settings.model_copy(update={"archive": archive})


def open_writer(settings: Settings) -> BundleWriter | SpoolWriter:
    """What makes instances durable as ``ingest.durability`` says; after the process was forked."""
    if settings.ingest.durability == "spool":
        return SpoolWriter(settings)
    return BundleWriter(open_storage(settings.storage.root, user=settings.storage.user), settings)


def open_readable(settings: Settings) -> Readable:
    """Everything that landed, as a process of this host reads it: the spool before the storage."""
    storage = open_storage(settings.storage.root, user=settings.storage.user)
    return SpoolFirst(spool_storage(settings), storage) if in_use(settings) else storage


def recover_all(settings: Settings) -> RecoveryReport:
    """`recover` for the spool, then for the storage; raises StorageError."""
    found: tuple[RecoveryReport, ...] = ()
    if in_use(settings):
        found += (recover(spool_storage(settings), spool_settings(settings)),)
    found += (recover(open_storage(settings.storage.root, user=settings.storage.user), settings),)
    return RecoveryReport(tuple(bundle for report in found for bundle in report.bundles))


class SpoolFirst(Readable):
    """The spool before the storage. A file that is shipped meanwhile is found on the storage: it is there before it
    leaves the spool."""

    def __init__(self, spool: LocalStorage, storage: Readable) -> None:
        self.spool = spool
        self.storage = storage
        self.url = storage.url

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        try:
            return self.spool.read(path, offset, length)
        except StorageMissing:
            return self.storage.read(path, offset, length)

    def size(self, path: str) -> int:
        try:
            return self.spool.size(path)
        except StorageMissing:
            return self.storage.size(path)

    def exists(self, path: str) -> bool:
        return self.spool.exists(path) or self.storage.exists(path)

    def walk(self, prefix: str = "", *, enter: Callable[[Entry], bool] | None = None) -> Iterator[Entry]:
        entries = {entry.path: entry for entry in self.spool.walk(prefix, enter=enter)}  # first: nothing can slip by
        further = self.storage.walk(prefix, enter=enter)
        entries |= {entry.path: entry for entry in further if entry.path not in entries}
        yield from (entries[path] for path in sorted(entries))


class SpoolWriter:
    """A bundle writer on the spool that keeps to its limit. Thread-safe."""

    def __init__(self, settings: Settings) -> None:
        quiet_age_s = settings.ingest.spool_seal_s
        self._storage = spool_storage(settings)
        self._writer = BundleWriter(self._storage, spool_settings(settings), quiet_age_s=quiet_age_s)
        self._limit = settings.ingest.spool_limit_mib << 20
        self._lock = threading.Lock()
        self._used = 0
        self._look_at = 0.0

    def store(self, member: NewMember) -> MemberRecord:
        """Return when the member is synced in the spool; raises StorageFull at its limit, and StorageError."""
        self._claim(member.size)
        return self._writer.store(member)

    def check(self) -> None:
        """Raise StorageFull where the spool is at its limit, and StorageError where its disk takes nothing."""
        self._claim(1)
        self._writer.check()

    def close(self) -> None:
        """Seal the bundle, so that it can be shipped."""
        self._writer.close()

    def _claim(self, size: int) -> None:
        with self._lock:
            now = time.monotonic()
            if now >= self._look_at:
                self._used = sum(entry.size for entry in self._storage.walk(BUNDLES))
                self._look_at = now + LOOK_S
            if self._used + size > self._limit:
                raise StorageFull("the spool has reached ingest.spool_limit_mib; send again when some of it is shipped")
            self._used += size


@dataclass(frozen=True, slots=True)
class Backlog:
    """What is not shipped yet: bundles (open ones too), their size in bytes, when the oldest was begun (UTC)."""

    bundles: int = 0
    bytes: int = 0
    oldest: datetime | None = None


def backlog(settings: Settings) -> Backlog:
    """What the spool holds now; raises StorageError."""
    tars = [entry for entry in spool_storage(settings).walk(BUNDLES) if entry.path.endswith(".tar")]
    begun = [when for entry in tars if (when := _begun(entry.path)) is not None]
    return Backlog(len(tars), sum(entry.size for entry in tars), min(begun, default=None))


def _begun(bundle: str) -> datetime | None:
    """When a bundle was begun: its name starts with that."""
    with suppress(ValueError):
        stamp = bundle_id(bundle).partition("Z")[0]
        return datetime.strptime(stamp, "%Y%m%dT%H%M%S%f").replace(tzinfo=timezone.utc)
    return None


def remove_empty_folders(settings: Settings) -> None:
    """Remove the folders of earlier days of which everything is shipped."""
    today = datetime.now(timezone.utc).strftime("%Y/%m/%d")
    root = settings.ingest.spool_dir / BUNDLES
    for name, _, _ in os.walk(root, topdown=False):
        day = Path(name).relative_to(root).as_posix()
        if day != "." and day < today[: len(day)]:
            with suppress(OSError):  # not empty
                Path(name).rmdir()
