"""The write side: instances go into the one open bundle of this process, and come back when they are durable there."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone

from sphere.conf.errors import StorageError, StorageFull
from sphere.conf.settings import Settings
from sphere.ingest.dayfile import unique_name
from sphere.ingest.folders import BUNDLES
from sphere.ingest.groups import GroupCommit
from sphere.ingest.lock import BundleLock
from sphere.ingest.members import FileRange, NewMember, Prepared, prepare
from sphere.ingest.open_bundle import OpenBundle
from sphere.ingest.records import MemberRecord
from sphere.ingest.storage.base import Storage

__all__ = ["BundleWriter", "FileRange", "NewMember"]

PUBLISH_IDLE_S = 0.2  # seconds without a write after which an open bundle is published
PUBLISH_LOAD_S = 0.75  # seconds from the first unpublished write after which it is published under load
QUIET_S = 1.0  # seconds without a write after which a bundle may be sealed before its time
GIVE_UP_S = 8.0  # seconds after which members whose bundles fail are refused: service goes on within 10 s, or says so
REPAIR_S = 5.0  # seconds between attempts to repair a bundle that a write failed on

_log = logging.getLogger(__name__)


class _Job:
    """What waits for its turn: a member to be written, or something to be done while nothing is written."""

    __slots__ = ("action", "error", "prepared", "record")

    def __init__(self, prepared: Prepared | None = None, action: Callable[[], None] | None = None) -> None:
        self.prepared = prepared
        self.action = action
        self.record: MemberRecord | None = None
        self.error: StorageError | None = None


class BundleWriter:
    """The open bundle of this process. Thread-safe; made after the process was forked.

    A bundle is begun by the first member, and sealed when it has reached ``storage.seal_mib`` or was open for
    ``storage.seal_age_s`` (by `clock`, in seconds), or for `quiet_age_s` and nothing comes any more. A background
    thread seals, publishes to other hosts within a second, and repairs a bundle that a write failed on; members go into
    a new bundle from then on.
    """

    def __init__(
        self,
        storage: Storage,
        settings: Settings,
        *,
        quiet_age_s: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._storage = storage
        self._state_dir = settings.archive.state_dir
        self._seal_size = settings.storage.seal_mib << 20
        self._seal_age_s = settings.storage.seal_age_s
        self._quiet_age_s = quiet_age_s
        self._clock = clock
        self._bundle: OpenBundle | None = None
        self._leaving: list[OpenBundle] = []  # full, old or failed: to be sealed or repaired, written to by nobody
        self._closed = False
        self._groups: GroupCommit[_Job] = GroupCommit(self._commit)
        self._ticking = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bundle-keeper", daemon=True)
        self._thread.start()

    def store(self, member: NewMember) -> MemberRecord:
        """Return when the member is durable in the bundle.

        Raises StorageFull or StorageError when it is not; then nothing of it is visible.
        """
        job = _Job(prepare(member))
        self._groups.submit(job)
        if job.record is None:
            raise job.error or StorageError("the bundle writer ended without storing the instance")
        return job.record

    def close(self) -> None:
        """Seal the bundle; `store` raises StorageError from now on. What cannot be sealed now is left to recovery."""
        self._stop.set()
        self._thread.join()
        self._groups.submit(_Job(action=self._close))
        with self._ticking:
            self._settle(last=True)

    def tick(self) -> None:
        """Do what is due: seal by age, publish, settle bundles that are done with; it is done when this returns.

        The background thread calls it.
        """
        with self._ticking:
            self._groups.submit(_Job(action=self._seal_if_old))
            ready: list[OpenBundle] = []
            if not self._storage.visible_at_once:
                self._groups.submit(_Job(action=lambda: self._publish_if_due(ready)))
            for bundle in ready:
                self._publish_journal(bundle)
            self._settle()

    def _run(self) -> None:
        pause = 0.5 if self._storage.visible_at_once else PUBLISH_IDLE_S / 4
        while not self._stop.wait(pause):
            if self._bundle is not None or self._leaving:
                try:
                    self.tick()
                except Exception:  # noqa: BLE001  the keeper lives as long as its writer: the next tick tries again
                    _log.exception("bundle keeper failed; it goes on")

    # Everything below down to _publish_if_due runs in one thread at a time, the leader of a group.

    def _commit(self, group: list[_Job]) -> None:
        members = [job for job in group if job.prepared is not None]
        if members:
            try:
                self._write(members)
            except StorageError as error:
                for job in members:
                    job.error = error
        for job in group:
            if job.action is not None:
                job.action()

    def _write(self, jobs: list[_Job]) -> None:
        """Write the members; where a node of the storage died, once more into another bundle."""
        give_up = time.monotonic() + GIVE_UP_S
        for left in reversed(range(self._storage.attempts)):
            try:
                self._write_once(jobs, self._storage.attempts - 1 - left)
                return
            except StorageError as error:
                if not left or isinstance(error, StorageFull) or self._closed or time.monotonic() > give_up:
                    raise
                _log.warning("members go into another bundle: %s", error)

    def _write_once(self, jobs: list[_Job], attempt: int) -> None:
        if self._closed:
            raise StorageError("the bundle writer is closed: this process is shutting down")
        bundle = self._bundle or self._open(attempt)
        try:
            records = bundle.put([job.prepared for job in jobs if job.prepared is not None], self._clock())
        except BaseException:
            self._leave(failed=True)
            raise
        for job, record in zip(jobs, records, strict=True):
            job.record = record
        try:
            bundle.journal.add(records)
        except StorageError as error:  # the members are durable: recovery adds their lines
            _log.error("journal of bundle %s failed: %s", bundle.id, error)
            self._leave(failed=True)
            return
        if bundle.good >= self._seal_size:
            self._leave()

    def _open(self, attempt: int) -> OpenBundle:
        path, lock = self._new_bundle()
        try:
            self._bundle = OpenBundle(self._storage, self._state_dir, path, lock, self._clock(), attempt=attempt)
        except BaseException:
            lock.release(keep=not self._storage.visible_at_once)  # HDFS may have made it: recovery removes it
            raise
        return self._bundle

    def _new_bundle(self) -> tuple[str, BundleLock]:
        for _ in range(8):  # recovery may hold the lock for the moment it takes to see that there is no such bundle
            path = new_bundle_path()
            lock = BundleLock.take(self._state_dir, path)
            if lock is not None:
                return path, lock
        raise StorageError(f"no bundle could be locked below {self._state_dir}")

    def _leave(self, *, failed: bool = False) -> None:
        bundle, self._bundle = self._bundle, None
        if bundle is not None:
            bundle.failed = failed
            self._leaving.append(bundle)

    def _close(self) -> None:
        self._closed = True
        self._leave()

    def _seal_if_old(self) -> None:
        if self._bundle is not None:
            now = self._clock()
            age_s, quiet_s = now - self._bundle.opened_at, now - self._bundle.written_at
            if age_s >= self._seal_age_s or (age_s >= self._quiet_age_s and quiet_s >= QUIET_S):
                self._leave()

    def _publish_if_due(self, ready: list[OpenBundle]) -> None:
        bundle = self._bundle
        now = self._clock()
        if bundle is None or not bundle.publish_due(now, idle_s=PUBLISH_IDLE_S, load_s=PUBLISH_LOAD_S):
            return
        try:
            bundle.publish()
        except StorageError as error:
            _log.error("publishing bundle %s failed: %s", bundle.id, error)
            self._leave(failed=True)
            return
        ready.append(bundle)

    # The rest runs in the keeper's thread.

    def _publish_journal(self, bundle: OpenBundle) -> None:
        try:
            bundle.journal.publish()
        except StorageError as error:
            _log.error("publishing the journal of bundle %s failed: %s", bundle.id, error)
            bundle.failed = True
            self._groups.submit(_Job(action=lambda: self._leave(failed=True) if self._bundle is bundle else None))

    def _settle(self, *, last: bool = False) -> None:
        """Seal or repair the bundles that are done with; `last`: what fails is left to `recovery.recover`."""
        for bundle in list(self._leaving):
            if not bundle.failed:
                bundle.seal()
            if bundle.failed and not bundle.settled and (last or self._clock() >= bundle.repair_at):
                bundle.repair(self._clock() + REPAIR_S)
            if bundle.settled or last:
                self._leaving.remove(bundle)
                bundle.lock.release(keep=not bundle.settled)


def new_bundle_path() -> str:
    """``bundles/YYYY/MM/DD/<id>.tar``; ids sort by the time (UTC) their bundle was begun."""
    now = datetime.now(timezone.utc)
    return f"{BUNDLES}/{now:%Y/%m/%d}/{unique_name(now)}.tar"
