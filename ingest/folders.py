"""Folders of bundles in which nothing happens any more: they are not listed again while they are as they were.

An archive of many years has a folder for each of its days, and every extraction, recovery and index looks at what is
there. This remembers, on this host, which bundles of a day were found sealed, with the modification time that the
folder had: a file that comes to a folder or leaves it changes that. It is a cache, and says nothing of the catalog:
who asks says which bundles need not be seen. Without it, or where it is damaged, every folder is listed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

import orjson

from sphere.conf.private import make_private
from sphere.ingest.storage.base import Entry, Readable

BUNDLES = "bundles"  # folder of bundles below the storage root
RESTS_S = 60.0
"""Seconds for which a folder must not have changed: longer than the steps of any file system's times."""
_TAR, _JOURNAL = ".tar", ".journal"
_DAY = 3  # slashes in bundles/YYYY/MM/DD
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Day:
    """A folder: when it was changed last, 0 where it must be listed again; the paths of its sealed bundles."""

    mtime: float
    sealed: frozenset[str]


_Days = dict[str, _Day]
_Stamp = tuple[int, int, int]
_kept: dict[Path, tuple[_Stamp, _Days]] = {}
"""What this process read of a file, and which one that was: to take it apart is half of a look at 50,000 bundles."""


def bundle_of(identity: str) -> str:
    """The path of the bundle of this id, which begins with the day (YYYYMMDD, UTC) on which it was begun."""
    return f"{BUNDLES}/{identity[:4]}/{identity[4:6]}/{identity[6:8]}/{identity}{_TAR}"


class SealedFolders:
    """What this host remembers of the folders of one storage. For one thread at a time."""

    def __init__(self, storage: Readable, state_dir: Path) -> None:
        self._storage = storage
        self._path = state_dir / f"folders-{hashlib.sha256(storage.url.encode()).hexdigest()[:16]}.json"
        self._days: _Days = {}
        self._seen: dict[str, float] = {}
        self._listed: dict[str, set[str]] = {}

    def entries(self, known: Container[str] | None = None) -> list[Entry]:
        """The files of all bundles, in the order of their paths, but for folders in which nothing changed and every
        bundle is sealed and `known` (None: where that does not matter). Raises StorageError."""
        self._days = self._read()
        self._seen, self._listed = {}, {}

        def enter(folder: Entry) -> bool:
            if folder.path.count("/") != _DAY:
                return True
            self._seen[folder.path] = folder.mtime
            day = self._days.get(folder.path)
            if day is None or day.mtime != folder.mtime:
                return True
            return known is not None and not all(map(known.__contains__, day.sealed))

        found = list(self._storage.walk(BUNDLES, enter=enter))
        for entry in found:
            self._listed.setdefault(entry.path.rpartition("/")[0], set()).add(entry.path)
        return found

    def is_sealed(self, bundle: str) -> bool:
        """Whether the bundle is known to be sealed."""
        day = self._days.get(bundle.rpartition("/")[0])
        return day is not None and bundle in day.sealed

    def remember(self, sealed: Container[str]) -> None:
        """After `entries`: these bundles, at least, are sealed."""
        rested = time.time() - RESTS_S
        days: _Days = {}
        for folder, mtime in self._seen.items():
            paths = self._listed.get(folder)
            if paths is None and folder in self._days:  # as it was, or now empty
                days[folder] = self._days[folder]
                continue
            bundles = {path for path in paths or () if path.endswith(_TAR)}
            known = {bundle for bundle in bundles if bundle in sealed or self.is_sealed(bundle)}
            journals = {path.removesuffix(_JOURNAL) + _TAR for path in paths or () if path.endswith(_JOURNAL)}
            settled = known == bundles >= journals and mtime < rested
            days[folder] = _Day(mtime if settled else 0.0, frozenset(known))
        if days != self._days:
            self._write(days)
        self._days = days

    def _read(self) -> _Days:
        stamp = self._stamp()
        kept = _kept.get(self._path)
        if kept is not None and kept[0] == stamp:
            return kept[1]
        try:
            days = _parsed(self._path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("what was known of the folders of bundles is damaged and found anew: %s", type(error).__name__)
            return {}
        if stamp is not None and stamp == self._stamp():
            _kept[self._path] = stamp, days
        return days

    def _stamp(self) -> _Stamp | None:
        """Which file there is: each one is written under another name first."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def _write(self, days: _Days) -> None:
        fresh = self._path.with_suffix(f".{os.getpid()}.new")
        ids = {folder: (day.mtime, sorted(map(_id, day.sealed))) for folder, day in days.items()}
        try:
            make_private(fresh.parent)
            fresh.write_bytes(orjson.dumps({"days": ids}))
            fresh.replace(self._path)
        except OSError as error:  # all is listed again then
            log.warning("folders of bundles cannot be remembered: %s", error.strerror)


def _parsed(data: bytes) -> _Days:
    found = orjson.loads(data)["days"].items()
    return {
        folder: _Day(float(mtime), frozenset(f"{folder}/{identity}{_TAR}" for identity in sealed))
        for folder, (mtime, sealed) in found
    }


def _id(bundle: str) -> str:
    return bundle.rpartition("/")[2].removesuffix(_TAR)
