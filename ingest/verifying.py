"""Reading sealed bundles back, once each: what was promised is looked at where it lies, beside landing and slower.

A process of low priority takes one bundle at a time, the newest first, at a bounded rate. What is not as promised is
recorded, logged and counted; nothing is changed or removed. See docs/decisions/0002-bundles-and-journal.md.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from sphere.conf import serving
from sphere.conf.errors import SphereError, StorageError, StorageMissing
from sphere.conf.private import make_private
from sphere.conf.settings import Settings
from sphere.ingest.folders import SealedFolders
from sphere.ingest.journal import Landed, journal_path
from sphere.ingest.recovery import verify
from sphere.ingest.storage import Entry, Readable, open_storage
from sphere.ingest.watchdog import watched

LOOK_S = 5.0  # seconds between looks for what was sealed
AGAIN_S = 60.0  # seconds before a bundle that the storage did not give is tried again
DAMAGED_S = 3600.0  # seconds before one that is not as promised is read again: somebody may have put it in order
TRIES = 3  # failures of the storage after which a bundle is called damaged
NAMED = 20  # damaged bundles that are named
LINE = 300  # characters of an error of the storage that are kept
STUCK_S = 300.0  # seconds without progress: see sphere.ingest.shipping
log = logging.getLogger(__name__)

_DDL = """
CREATE TABLE IF NOT EXISTS bundles (
    bundle TEXT PRIMARY KEY, size INTEGER NOT NULL, mtime REAL NOT NULL, problem TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS damaged ON bundles (bundle) WHERE problem != '';
"""


class Stopped(Exception):
    """The process is to end; the bundle under way is read again by the next one."""


class Checked:
    """Which bundles were read back, on this host: ``<state_dir>/verified.sqlite``. Without it all are
    read anew.

    A bundle that was written anew since has another size or time, and is none of them.
    """

    def __init__(self, state_dir: Path) -> None:
        make_private(state_dir)
        path = state_dir / "verified.sqlite"
        try:
            self._db = _open(path)
        except sqlite3.DatabaseError:
            log.warning("%s is damaged: bundles are read back anew", path.name)
            for file in state_dir.glob(f"{path.name}*"):
                file.unlink(missing_ok=True)
            self._db = _open(path)

    def close(self) -> None:
        self._db.close()

    def __contains__(self, bundle: object) -> bool:
        """Whether the bundle, or one of that name, was found as promised."""
        found = self._db.execute("SELECT problem FROM bundles WHERE bundle = ?", (bundle,)).fetchone()
        return found is not None and not found[0]

    def knows(self, entry: Entry) -> bool:
        """Whether exactly this file was read, whatever was found."""
        found = self._db.execute("SELECT size, mtime FROM bundles WHERE bundle = ?", (entry.path,)).fetchone()
        return bool(found == (entry.size, entry.mtime))

    def record(self, entry: Entry, problem: str) -> None:
        """What was found: "" where all is as promised."""
        self._db.execute(
            "INSERT OR REPLACE INTO bundles VALUES (?, ?, ?, ?)", (entry.path, entry.size, entry.mtime, problem)
        )

    def forget(self, bundle: str) -> None:
        """It is no longer there."""
        self._db.execute("DELETE FROM bundles WHERE bundle = ?", (bundle,))

    def damaged(self) -> dict[str, str]:
        """Bundles that are not as promised, with what was found."""
        return dict(self._db.execute("SELECT bundle, problem FROM bundles WHERE problem != '' ORDER BY bundle"))

    def good(self) -> tuple[int, int]:
        """Bundles that are as promised, and their bytes."""
        count, size = self._db.execute(
            "SELECT count(*), coalesce(sum(size), 0) FROM bundles WHERE problem = ''"
        ).fetchone()
        return int(count), int(size)


def _open(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")  # what a crash of the host costs is read again
        db.executescript(_DDL)
        db.execute("SELECT bundle, size, mtime, problem FROM bundles LIMIT 1").fetchone()
    except sqlite3.DatabaseError:
        db.close()
        raise
    return db


class Paced(Readable):
    """A storage that gives `rate` bytes a second at most; raises Stopped once `stop` is set.

    `alive_at` is the monotonic time of its last answer.
    """

    def __init__(self, storage: Readable, rate: float, stop: threading.Event) -> None:
        self._storage, self._rate, self._stop = storage, rate, stop
        self._free_at = 0.0
        self.url = storage.url
        self.alive_at = time.monotonic()

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        data = self._storage.read(path, offset, length)
        self.alive_at = now = time.monotonic()
        self._free_at = max(self._free_at, now) + len(data) / self._rate
        if self._stop.wait(self._free_at - now):
            raise Stopped
        self.alive_at = time.monotonic()
        return data

    def size(self, path: str) -> int:
        return self._storage.size(path)

    def exists(self, path: str) -> bool:
        return self._storage.exists(path)

    def walk(self, prefix: str = "", *, enter: Callable[[Entry], bool] | None = None) -> Iterator[Entry]:
        return self._storage.walk(prefix, enter=enter)


@dataclass(slots=True)
class _Trouble:
    """A bundle that is to be read again at a (monotonic) time, after so many failures of the storage."""

    due: float
    failures: int = 0


class Verifier:
    """Reads back what is sealed; one at a time. `checked` is where it remembers."""

    def __init__(
        self,
        settings: Settings,
        checked: Checked,
        stop: threading.Event,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._checked, self._stop, self._clock = settings, checked, stop, clock
        storage = open_storage(settings.storage.root, user=settings.storage.user)
        self.storage = Paced(storage, settings.ingest.verify_mib_s * (1 << 20), stop)
        self._landed = Landed(storage)
        self._troubles: dict[str, _Trouble] = {}
        self._gone: set[str] = set()  # bundles that the last look missed
        self._state = serving.VerifyState()

    def round(self) -> None:
        """Read back what is due, the newest first, for LOOK_S or until the first bundle after that is done."""
        try:
            due = self._due()
        except StorageError as error:
            log.info("sealed bundles cannot be looked for: %s", error)
            return
        self._tell(len(due))
        end = time.monotonic() + LOOK_S
        with suppress(Stopped):
            for number, entry in enumerate(due, 1):
                self._check(entry)
                self._tell(len(due) - number)
                if time.monotonic() > end:
                    return

    def _due(self) -> list[Entry]:
        """Sealed bundles that were not read as they are now, and damaged ones whose time has come."""
        folders = SealedFolders(self.storage, self._settings.archive.state_dir)
        entries = {entry.path: entry for entry in folders.entries(self._checked)}
        folders.remember(self._checked)
        self._look_for_lost(entries)
        sizes = {path: entry.size for path, entry in entries.items()}
        due = [entry for path, entry in entries.items() if path.endswith(".tar") and self._is_due(entry)]
        due = [entry for entry in due if self._landed.sealed(entry.path, sizes.get(journal_path(entry.path), 0))]
        return sorted(due, key=lambda entry: entry.path, reverse=True)

    def _is_due(self, entry: Entry) -> bool:
        trouble, known = self._troubles.get(entry.path), self._checked.knows(entry)
        if trouble is not None and self._clock() < trouble.due:
            return not known and not trouble.failures
        return not known or entry.path not in self._checked

    def _look_for_lost(self, entries: Mapping[str, Entry]) -> None:
        """Bundles that are gone while the journal that promises their members is there, in two looks; and damaged ones
        of which nothing is left are damaged no more."""
        journals = {
            path.removesuffix(".journal") + ".tar": entry
            for path, entry in entries.items()
            if path.endswith(".journal")
        }
        gone = {
            bundle
            for bundle, journal in journals.items()
            if bundle not in entries and self._landed.sealed(bundle, journal.size) and not self.storage.exists(bundle)
        }
        for bundle in gone & self._gone:
            self._found(Entry(bundle, 0, 0.0), "is gone, and its journal is there")
        self._gone = gone
        for bundle in self._checked.damaged():
            if bundle not in entries and bundle not in gone and not self.storage.exists(bundle):
                self._checked.forget(bundle)
                self._troubles.pop(bundle, None)

    def _check(self, entry: Entry) -> None:
        try:
            problem = self._problem(entry.path)
        except StorageMissing:  # it left meanwhile
            return
        except StorageError as error:
            trouble = self._troubles.setdefault(entry.path, _Trouble(0.0))
            trouble.failures += 1
            trouble.due = self._clock() + AGAIN_S
            if trouble.failures >= TRIES:
                self._found(entry, f"cannot be read: {str(error)[:LINE]}")
            return
        self._troubles.pop(entry.path, None)
        if problem:
            self._troubles[entry.path] = _Trouble(self._clock() + DAMAGED_S)
        self._found(entry, problem)

    def _problem(self, bundle: str) -> str:
        """What is wrong with it; read twice where something is, as it may have been written anew meanwhile."""
        for _ in range(2):
            problems = verify(self.storage, bundle).problems
            if not problems:
                return ""
        return "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")

    def _found(self, entry: Entry, problem: str) -> None:
        if problem and self._checked.damaged().get(entry.path) != problem:
            log.error("bundle %s is not as promised: %s", entry.path, problem)
        self._checked.record(entry, problem)

    def _tell(self, waiting: int) -> None:
        (bundles, size), damaged = self._checked.good(), self._checked.damaged()
        named = tuple(f"{bundle}: {problem}" for bundle, problem in list(damaged.items())[:NAMED])
        state = serving.VerifyState(bundles=bundles, bytes=size, waiting=waiting, damaged=len(damaged), named=named)
        if state != self._state:
            self._state = state
            serving.write_verify(self._settings.archive.state_dir, replace(state, written_at=serving.now()))


def run_verifier(settings: Settings, stop: threading.Event) -> None:
    """Read back what is sealed until `stop`, in a process of low priority.

    Ends the process where the storage does not answer for STUCK_S: `sphere serve` starts it again.
    """
    _stand_back()
    with closing(Checked(settings.archive.state_dir)) as checked:
        verifier = Verifier(settings, checked, stop)
        with watched(lambda: verifier.storage.alive_at, stuck_s=STUCK_S, work="reading back"):
            while not stop.is_set():
                try:
                    verifier.round()
                except SphereError as error:
                    log.error("reading bundles back: %s", error)
                verifier.storage.alive_at = time.monotonic()
                stop.wait(LOOK_S)


def _stand_back() -> None:
    """Take processors and disks that nobody else wants, where the system knows that."""
    with suppress(OSError):
        os.nice(19)
    import psutil  # type: ignore[import-untyped]

    with suppress(OSError, AttributeError, psutil.Error):
        psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)
