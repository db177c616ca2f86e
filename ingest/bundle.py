"""The write side: instances go into the one open bundle of this process, and come back when they are durable there."""

from __future__ import annotations

import logging
import math
import secrets
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import TypeVar

from sphere.conf.errors import StorageAway, StorageError, StorageFull
from sphere.conf.settings import Settings
from sphere.ingest.dayfile import unique_name
from sphere.ingest.folders import BUNDLES
from sphere.ingest.groups import GroupCommit
from sphere.ingest.lock import BundleLock
from sphere.ingest.members import FileRange, NewMember, Prepared, prepare
from sphere.ingest.open_bundle import OpenBundle
from sphere.ingest.records import MemberRecord
from sphere.ingest.storage.base import Storage
from sphere.ingest.storage.paths import TEMPORARY

__all__ = ["BundleWriter", "FileRange", "NewMember"]

PUBLISH_IDLE_S = 0.2  # seconds without a write after which an open bundle is published
PUBLISH_LOAD_S = 0.75  # seconds from the first unpublished write after which it is published under load
PREPARE_S = 0.5  # seconds after which an open bundle that need not be published is looked at, if nothing is due before
QUIET_S = 1.0  # seconds without a write after which a bundle may be sealed before its time
GIVE_UP_S = 8.0  # seconds after which members whose bundles fail are refused: service goes on within 10 s, or says so
REPAIR_S = 5.0  # seconds between attempts to repair a bundle that a write failed on

Found = TypeVar("Found")
_log = logging.getLogger(__name__)


class _Job:
    """What waits for its turn: a member to be written, or something to be done while nothing is written."""

    __slots__ = ("action", "error", "prepared", "record", "since")

    def __init__(self, prepared: Prepared | None = None, action: Callable[[], None] | None = None) -> None:
        self.prepared = prepared
        self.action = action
        self.record: MemberRecord | None = None
        self.error: Exception | None = None
        self.since = time.monotonic()


def _digested(job: _Job) -> bool:
    """Whether the digest of its member is had; an error of that is its own, and none of the group's."""
    assert job.prepared is not None
    try:
        job.prepared.settle()
    except Exception as error:  # noqa: BLE001  it is raised where the member was handed in
        job.error = error
    return job.error is None


class BundleWriter:
    """The open bundle of this process. Thread-safe; made after the process was forked.

    A bundle is begun by the first member, and sealed when it has reached ``storage.seal_mib`` or was open for
    ``storage.seal_age_s`` (by `clock`, in seconds), or for `quiet_age_s` and nothing comes any more. A background
    thread seals, publishes to other hosts within a second, and repairs a bundle that a write failed on; members go into
    a new bundle from then on. Where publishing takes a while, and members keep coming, two bundles take turns: one is
    published while the other one is written to.
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
        self._trial = f".ready-{secrets.token_hex(8)}{TEMPORARY}"
        self._bundle: OpenBundle | None = None
        self._resting: OpenBundle | None = None  # published whole; the next one to be written to
        self._leaving: list[OpenBundle] = []  # full, old or failed: to be sealed or repaired, written to by nobody
        self._closed = False
        self._groups: GroupCommit[_Job] = GroupCommit(self._commit)
        self._ticking = threading.Lock()
        self._stop = threading.Event()
        self._due_now = threading.Event()  # the keeper need not wait for its next look
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

    def check(self) -> None:
        """Write a small file, as durably as a member, and remove it; raises StorageError where that cannot be."""
        self._storage.write(self._trial, b"ready\n")
        self._storage.delete(self._trial)

    def close(self) -> None:
        """Seal the bundle; `store` raises StorageError from now on. What cannot be sealed now is left to recovery."""
        self._stop.set()
        self._due_now.set()
        self._thread.join()
        self._groups.submit(_Job(action=self._close))
        with self._ticking:
            self._settle(last=True)

    def tick(self) -> None:
        """Do what is due: seal by age, publish, settle bundles that are done with; it is done when this returns.

        The background thread calls it.
        """
        with self._ticking:
            self._alone(self._leave_if_old)
            if self._storage.visible_at_once:
                self._prepare(self._bundle)
            else:
                self._show()
            self._settle()

    def _run(self) -> None:
        pause = PREPARE_S if self._storage.visible_at_once else PUBLISH_IDLE_S / 4
        while not self._stop.is_set():
            self._due_now.wait(pause)
            self._due_now.clear()
            if self._stop.is_set():
                break
            if self._bundle is not None or self._resting is not None or self._leaving:
                try:
                    self.tick()
                except Exception:  # noqa: BLE001  the keeper lives as long as its writer: the next tick tries again
                    _log.exception("bundle keeper failed; it goes on")

    # Everything below down to _rest runs in one thread at a time, the leader of a group.

    def _commit(self, group: list[_Job]) -> None:
        members = [job for job in group if job.prepared is not None]
        if len(members) > 1:
            members = [job for job in members if _digested(job)]
        if members:
            try:
                self._write(members)
            except Exception as error:  # noqa: BLE001  whatever it is, what else waits for its turn is done all the same
                for job in members:
                    job.error = error
        for job in group:
            if job.action is not None:
                job.action()

    def _write(self, jobs: list[_Job]) -> None:
        """Write the members; where a node of the storage died, once more into another bundle."""
        last = self._storage.attempts - 1
        for attempt in range(last + 1):
            try:
                self._write_once(jobs, attempt)
                return
            except StorageError as error:
                give_up = min(job.since for job in jobs) + GIVE_UP_S  # the time that they waited for their turn counts
                in_vain = isinstance(error, (StorageFull, StorageAway)) or self._closed
                if attempt == last or in_vain or time.monotonic() > give_up:
                    raise
                _log.warning("members go into another bundle: %s", error)

    def _write_once(self, jobs: list[_Job], attempt: int) -> None:
        if self._closed:
            raise StorageError("the bundle writer is closed: this process is shutting down")
        bundle = self._bundle = self._bundle or self._next(attempt)
        try:
            records = bundle.put([job.prepared for job in jobs if job.prepared is not None], self._clock())
        except BaseException:
            self._leave(bundle, failed=True)
            raise
        for job, record in zip(jobs, records, strict=True):
            job.record = record
        try:
            bundle.journal.add(bundle.lines)
        except StorageError as error:  # the members are durable: recovery adds their lines
            _log.error("journal of bundle %s failed: %s", bundle.id, error)
            self._leave(bundle, failed=True)
            return
        if bundle.good >= self._seal_size:
            self._leave(bundle)
        elif bundle.unprepared:
            self._due_now.set()

    def _next(self, attempt: int) -> OpenBundle:
        resting = None if attempt else self._take_resting()
        return resting or self._open(attempt)

    def _open(self, attempt: int) -> OpenBundle:
        path, lock = self._new_bundle()
        try:
            return OpenBundle(self._storage, self._state_dir, path, lock, self._clock(), attempt=attempt)
        except BaseException:
            lock.release(keep=not self._storage.visible_at_once)  # HDFS may have made it: recovery removes it
            raise

    def _new_bundle(self) -> tuple[str, BundleLock]:
        for _ in range(8):  # recovery may hold the lock for the moment it takes to see that there is no such bundle
            path = new_bundle_path()
            lock = BundleLock.take(self._state_dir, path)
            if lock is not None:
                return path, lock
        raise StorageError(f"no bundle could be locked below {self._state_dir}")

    def _leave(self, bundle: OpenBundle, *, failed: bool = False) -> None:
        """Write to it no more."""
        self._bundle = None if self._bundle is bundle else self._bundle
        self._resting = None if self._resting is bundle else self._resting
        bundle.failed = bundle.failed or failed or not bundle.good  # one without a member is removed by its repair
        if bundle not in self._leaving:
            self._leaving.append(bundle)

    def _close(self) -> None:
        self._closed = True
        for bundle in self._opened():
            self._leave(bundle)

    def _leave_if_old(self) -> None:
        now = self._clock()
        for bundle in self._opened():
            age_s, quiet_s = now - bundle.opened_at, now - bundle.written_at
            if age_s >= self._seal_age_s or (age_s >= self._quiet_age_s and quiet_s >= QUIET_S):
                self._leave(bundle)

    def _opened(self) -> list[OpenBundle]:
        return [bundle for bundle in (self._bundle, self._resting) if bundle is not None]

    def _due(self) -> tuple[OpenBundle | None, bool]:
        """The bundle whose members are to be shown now, and whether it is published: where nothing comes any more, or
        where that costs nothing."""
        bundle, now = self._bundle, self._clock()
        if bundle is None or not bundle.publish_due(now, idle_s=PUBLISH_IDLE_S, load_s=PUBLISH_LOAD_S):
            return None, False
        if now - bundle.written_at < PUBLISH_IDLE_S and not self._storage.synced_is_shown:
            return bundle, False
        return (bundle, True) if self._publish_here(bundle) else (None, False)

    def _publish_here(self, bundle: OpenBundle) -> bool:
        """Publish it if it is still written to; whether that was done."""
        if self._bundle is not bundle:
            return False
        done = self._published(bundle)
        if not done:
            self._leave(bundle, failed=True)
        return done

    def _take_resting(self) -> OpenBundle | None:
        resting, self._resting = self._resting, None
        return resting

    def _turn(self, bundle: OpenBundle, other: OpenBundle) -> bool:
        """Write to the other one from now on, unless `bundle` was left meanwhile."""
        if self._bundle is not bundle:
            self._rest(other)
            return False
        self._bundle = other
        return True

    def _rest(self, bundle: OpenBundle) -> None:
        if bundle.failed or self._resting is not None:
            self._leave(bundle)
        else:
            self._resting = bundle

    # The rest runs in the keeper's thread.

    def _alone(self, action: Callable[[], Found]) -> Found:
        """What `action` gives, which runs while nothing is written."""
        found: list[Found] = []
        self._groups.submit(_Job(action=lambda: found.append(action())))
        return found[0]

    def _prepare(self, bundle: OpenBundle | None) -> bool:
        """Do what its next writes would wait for; whether it is good for them."""
        if bundle is None or bundle.failed:
            return False
        try:
            bundle.prepare()
        except StorageError as error:
            _log.error("preparing bundle %s failed: %s", bundle.id, error)
            self._alone(lambda: self._leave(bundle, failed=True))
            return False
        return True

    def _show(self) -> None:
        """Publish what is due: beside the writes if another bundle takes its turn, otherwise between them."""
        bundle, shown = self._alone(self._due)
        if bundle is None:
            return
        if shown:
            self._publish_journal(bundle)
        elif self._turned(bundle):
            try:
                self._publish_beside(bundle)
            finally:
                self._alone(lambda: self._rest(bundle))
        elif self._alone(lambda: self._publish_here(bundle)):
            self._publish_journal(bundle)

    def _publish_beside(self, bundle: OpenBundle) -> None:
        if self._published(bundle):
            self._publish_journal(bundle)
        else:
            bundle.failed = True

    def _turned(self, bundle: OpenBundle) -> bool:
        """Whether members go into another bundle now, one that need not be waited for."""
        other = self._alone(self._take_resting)
        try:
            other = other or self._open(0)
        except StorageError as error:
            _log.warning("no second bundle: %s", error)
            return False
        return self._prepare(other) and self._alone(lambda: self._turn(bundle, other))

    def _published(self, bundle: OpenBundle) -> bool:
        try:
            bundle.publish()
        except StorageError as error:
            _log.error("publishing bundle %s failed: %s", bundle.id, error)
            return False
        return True

    def _publish_journal(self, bundle: OpenBundle) -> None:
        try:
            bundle.journal.publish()
        except StorageError as error:
            _log.error("publishing the journal of bundle %s failed: %s", bundle.id, error)
            self._alone(lambda: self._leave(bundle, failed=True))

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
