"""Shipping: sealed bundles go from the spool to the storage, each exactly once.

The steps of a bundle are such that a process killed between any two of them leaves a state from which the next one
goes on: copied under a temporary name, read back, renamed; then the journal, which makes extraction see it; then it
leaves the spool. A bundle is therefore always readable from one side at least, and never listed twice, as its path is
the same.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from sphere.conf import serving
from sphere.conf.errors import BundleDamaged, SphereError, StorageError
from sphere.conf.private import make_private
from sphere.conf.settings import Settings
from sphere.ingest.erasing import erase
from sphere.ingest.folders import BUNDLES
from sphere.ingest.journal import Landed, journal_path
from sphere.ingest.recovery import recover, verify
from sphere.ingest.set_aside import kept_aside, set_aside
from sphere.ingest.spool import backlog, remove_empty_folders, spool_settings, spool_storage
from sphere.ingest.storage import Readable, open_storage
from sphere.ingest.storage.paths import TEMPORARY
from sphere.ingest.watchdog import watched

LOOK_S = 1.0  # seconds between looks at a spool with nothing to ship
RETRY_S = 1.0, 30.0  # seconds before the next attempt after a failure: first, longest
RECOVER_S = 10.0  # seconds between looks for bundles of dead receivers
STUCK_S = 120.0  # seconds without progress: a NameNode that is away is tried for 15 s, a pipeline for 10 s
DAMAGED_S = 3600.0  # seconds before a damaged bundle is read again, unless it changed: somebody put it in order
CHUNK = 4 << 20  # bytes copied or read back at a time
STEPS = ("verify", "copy", "copying", "read back", "rename", "journal", "remove", "remove journal", "done")
"""Names that `on_step` is called with, in the order of a bundle."""

OnStep = Callable[[str], None]
log = logging.getLogger(__name__)


class Stopped(Exception):
    """The process is to end; what is under way is done again by the next one."""


class ShippedByOther(SphereError):
    """Another process of this host ships: one that is about to end, or that somebody started."""


class _Away(Exception):
    """The storage failed where an error of the spool's own disk is expected."""

    def __init__(self, error: StorageError) -> None:
        self.error = error


@dataclass(slots=True)
class Shipped:
    """What one round did; `damaged` bundles stay in the spool, `error` says why the round ended early."""

    bundles: int = 0
    bytes: int = 0
    damaged: int = 0
    error: str = ""


class Shipper:
    """Ships what is sealed. One at a time for a spool: see `exclusive`.

    `alive_at` is the monotonic time of its last progress: hdfs-native may wait without end for a DataNode that died at
    the wrong moment, and a process that is killed then and started again goes on.
    """

    def __init__(
        self, settings: Settings, *, on_step: OnStep = lambda _: None, stopped: Callable[[], bool] = lambda: False
    ) -> None:
        self._settings = settings
        self._spool = spool_storage(settings)
        self._landed = Landed(self._spool)
        self._storage = open_storage(settings.storage.root, user=settings.storage.user)
        self._tell = on_step
        self._stopped = stopped
        self._recover_at = 0.0
        self._held: dict[str, tuple[tuple[int, int], float]] = {}  # damaged bundles: stamp, when they are read again
        self.alive_at = time.monotonic()

    def round(self) -> Shipped:
        """Ship every bundle that is sealed now, the oldest first; the first failure of the storage ends the round."""
        done = Shipped()
        try:
            self._step("look")
            for bundle in self._sealed():
                if self._is_held(bundle):
                    done.damaged += 1
                    continue
                try:
                    done.bytes += self._ship(bundle)
                    done.bundles += 1
                except BundleDamaged as error:
                    log.error("not shipped: %s", error)
                    self._hold(bundle)
                    done.damaged += 1
            remove_empty_folders(self._settings)
        except StorageError as error:
            done.error = str(error)
        except Stopped:
            log.info("shipping interrupted; it goes on with the next start")
        return done

    def _is_held(self, bundle: str) -> bool:
        """Whether it was found damaged, and neither changed since nor is it long ago."""
        stamp, until = self._held.get(bundle, ((0, 0), 0.0))
        return time.monotonic() < until and stamp == self._stamp(bundle)

    def _hold(self, bundle: str) -> None:
        self._held[bundle] = self._stamp(bundle), time.monotonic() + DAMAGED_S

    def _stamp(self, bundle: str) -> tuple[int, int]:
        """Times (nanoseconds) of the tar and of its journal."""
        with suppress(OSError):
            tar, journal = (self._spool.root / path for path in (bundle, journal_path(bundle)))
            return tar.stat().st_mtime_ns, journal.stat().st_mtime_ns
        return 0, 0

    def _sealed(self) -> list[str]:
        """The bundles that can be shipped, the oldest first; those of dead receivers are sealed before."""
        now = time.monotonic()
        if now >= self._recover_at:
            self._recover_at = now + RECOVER_S
            recover(self._spool, spool_settings(self._settings))
            self._finish_removals()
        sizes = {entry.path: entry.size for entry in self._spool.walk(BUNDLES)}
        tars = sorted(path for path in sizes if path.endswith(".tar"))
        return [bundle for bundle in tars if self._is_sealed(bundle, sizes.get(journal_path(bundle), 0))]

    def _is_sealed(self, bundle: str, journal_size: int) -> bool:
        """Also where the disk does not give its journal: `_ship` finds it damaged, and others go on."""
        try:
            return self._landed.sealed(bundle, journal_size) is not None
        except StorageError:
            return True

    def _finish_removals(self) -> None:
        """A journal whose tar is on the storage only: who shipped it was killed before its last step."""
        names = {entry.path for entry in self._spool.walk(BUNDLES)}
        for path in sorted(names):
            bundle = path.removesuffix(".journal") + ".tar"
            alone = path.endswith(".journal") and bundle not in names and not self._spool.exists(bundle)
            if alone and self._storage.exists(bundle):
                self._spool.delete(path)

    def _ship(self, bundle: str) -> int:
        """All steps of a bundle that are not done yet; its size in bytes."""
        self._step("verify")
        wanted = self._verified(bundle)
        if wanted is None:
            return 0
        if not self._storage.exists(bundle):
            self._copy(bundle, wanted)
        elif self._fingerprint(self._storage, bundle) != wanted:
            raise BundleDamaged(f"bundle {bundle}: the storage has other bytes under its name")
        else:
            self._storage.delete(_temporary(bundle))  # of a process that was killed while it had both names
        self._step("journal")
        self._copy_journal(bundle)
        self._step("remove")
        self._spool.delete(bundle)
        self._step("remove journal")
        self._spool.delete(journal_path(bundle))
        self._step("done")
        log.info("bundle shipped bytes=%d", wanted[0])
        return wanted[0]

    def _verified(self, bundle: str) -> tuple[int, str] | None:
        """The fingerprint of a bundle of the spool, once its members have their digests and its journal says the same;
        None where it is no more. Members with other bytes are set aside.

        Raises BundleDamaged.
        """
        try:
            found = verify(self._spool, bundle)
            alone = len(found.problems) == len(found.damaged)  # nothing else is wrong
            if found.damaged and alone and not self._on_storage(bundle):
                self._step("set aside")
                set_aside(self._spool, bundle, found.damaged)
                if not self._spool.exists(bundle):  # it had no others
                    return None
                found = verify(self._spool, bundle)
            elif found.problems and not found.damaged:
                # who set members aside may have been killed before the journal was written
                erase(self._spool, bundle, ())
                found = verify(self._spool, bundle)
            problems = found.problems
            if not problems:
                return self._fingerprint(self._spool, bundle)
        except _Away as away:
            raise away.error from None
        except StorageError as error:  # this disk, not the storage
            problems = (str(error),)
        raise BundleDamaged(f"bundle {bundle} of the spool: {'; '.join(problems[:3])}")

    def _on_storage(self, bundle: str) -> bool:
        try:
            return self._storage.exists(bundle)
        except StorageError as error:
            raise _Away(error) from None

    def _copy(self, bundle: str, wanted: tuple[int, str]) -> None:
        """Bring the tar's bytes to the storage, look at them there, and give them their name."""
        temporary = _temporary(bundle)
        self._step("copy")
        self._storage.delete(temporary)  # of a process that was killed here
        appender = self._storage.create(temporary)
        try:
            for offset in range(0, wanted[0], CHUNK):
                appender.write([self._spool.read(bundle, offset, CHUNK)])
                self._step("copying")
            appender.close()
        finally:
            appender.abandon()
        self._step("read back")
        if self._fingerprint(self._storage, temporary) != wanted:
            raise StorageError(f"bundle {bundle}: the storage gives back other bytes than were written")
        self._step("rename")
        self._storage.rename(temporary, bundle)

    def _copy_journal(self, bundle: str) -> None:
        path = journal_path(bundle)
        lines = self._spool.read(path)
        if not self._storage.exists(path) or self._storage.read(path) != lines:
            self._storage.write(path, lines)
            if self._storage.read(path) != lines:
                raise StorageError(f"journal of {bundle}: the storage gives back other lines than were written")

    def _fingerprint(self, storage: Readable, path: str) -> tuple[int, str]:
        """(size in bytes, sha256) of a file."""
        size, sha = storage.size(path), hashlib.sha256()
        for offset in range(0, size, CHUNK):
            sha.update(storage.read(path, offset, min(CHUNK, size - offset)))
            self._step("reading")
        return size, sha.hexdigest()

    def _step(self, name: str) -> None:
        self.alive_at = time.monotonic()
        if self._stopped():
            raise Stopped
        self._tell(name)


def _temporary(bundle: str) -> str:
    """The one name under which a bundle is copied: a process that goes on after another's end removes it first."""
    folder, _, name = bundle.rpartition("/")
    return f"{folder}/.{name}{TEMPORARY}"


@contextmanager
def exclusive(settings: Settings) -> Iterator[None]:
    """No other process of this host ships; raises ShippedByOther where one does."""
    make_private(settings.ingest.spool_dir)
    fd = os.open(settings.ingest.spool_dir / "ship.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ShippedByOther(f"another process ships from {settings.ingest.spool_dir}") from None
        yield
    finally:
        os.close(fd)


def run_shipper(settings: Settings, stop: threading.Event, *, on_step: OnStep = lambda _: None) -> None:
    """Ship until `stop`; failures are tried again after 1 s, then twice as long each time, 30 s at most.

    Waits while another process ships. Ends the process where the storage does not answer for STUCK_S: `sphere serve`
    starts it again.
    """
    waits = False
    while not stop.is_set():
        try:
            with exclusive(settings):
                _ship_until(settings, stop, on_step)
        except ShippedByOther as error:
            if not waits:
                log.warning("%s; this one waits until it ends", error)
                serving.write_spool(settings.archive.state_dir, _waiting(settings, str(error)))
            waits = True
            stop.wait(LOOK_S)


def _ship_until(settings: Settings, stop: threading.Event, on_step: OnStep) -> None:
    shipper = Shipper(settings, on_step=on_step, stopped=stop.is_set)
    state = serving.SpoolState()
    pause = RETRY_S[0]
    with watched(lambda: shipper.alive_at, stuck_s=STUCK_S, work="shipping"):
        while not stop.is_set():
            done = shipper.round()
            if done.error:
                log.warning("shipping failed, next attempt in %.0f s: %s", pause, done.error)
            state = _after(state, done, settings)
            serving.write_spool(settings.archive.state_dir, state)
            stop.wait(pause if done.error else LOOK_S)
            pause = min(2 * pause, RETRY_S[1]) if done.error else RETRY_S[0]


def _waiting(settings: Settings, error: str) -> serving.SpoolState:
    """The state of a shipper that is not the one which ships."""
    return _after(serving.SpoolState(), Shipped(error=error), settings)


def _after(before: serving.SpoolState, done: Shipped, settings: Settings) -> serving.SpoolState:
    """The state after a round."""
    left = backlog(settings)
    return serving.SpoolState(
        written_at=serving.now(),
        bundles=left.bundles,
        bytes=left.bytes,
        oldest=left.oldest.isoformat(timespec="milliseconds") if left.oldest else "",
        shipped_bundles=before.shipped_bundles + done.bundles,
        shipped_bytes=before.shipped_bytes + done.bytes,
        damaged=done.damaged,
        set_aside=kept_aside(settings),
        failing_since=(before.failing_since or serving.now()) if done.error else "",
        error=done.error,
    )
