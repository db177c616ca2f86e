"""The tail of the journals: members that landed beyond what a catalog version has, for a few `stat` calls a query."""

from __future__ import annotations

import functools
import logging
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Set
from datetime import datetime, timedelta, timezone
from pathlib import Path

from sphere.conf.errors import BundleDamaged, StorageError
from sphere.ingest.folders import BUNDLES, SealedFolders, bundle_of
from sphere.ingest.journal import Landed
from sphere.ingest.records import MemberRecord
from sphere.ingest.spool import SpoolFirst
from sphere.ingest.storage.base import Readable
from sphere.ingest.storage.local import LocalStorage

log = logging.getLogger(__name__)

FAR_S = 1.0
"""Seconds between looks at a storage on which looking costs a call to a server; other hosts publish as often."""
AWAY_S = 30.0
"""Seconds until the next look at a storage that did not answer, while this host's spool has what arrives here."""
COARSE_NS = 50_000_000
"""A folder changed less than this before it was read may change again with the same modification time."""

_JOURNAL = ".journal"
_Stamp = tuple[int, int]


class JournalTail:
    """Gives each member once that journals have beyond `positions` (bytes by bundle). For one thread at a time.

    `sealed` bundles are never looked at. On local disk, only the folders of today and of yesterday (UTC) are watched
    for new bundles: bundles are begun in the folder of the day. Elsewhere this host's own journals are read from their
    local mirror (or the spool) at once, those of other hosts from the storage, at most every FAR_S.
    """

    def __init__(
        self, storage: Readable, state_dir: Path, positions: Mapping[str, int], sealed: Set[str] = frozenset()
    ) -> None:
        self._near, self._far = _sides(storage)
        self._state_dir = state_dir
        self._landed = Landed(storage, state_dir)
        self._mirrors = state_dir / "journal"
        self._positions = dict(positions)
        self._sealed = set(sealed)
        self._open: set[str] = set()  # bundles whose journals are looked at
        self._queue: deque[MemberRecord] = deque()
        self._stamps: dict[str, _Stamp] = {}
        self._walked_near = self._walked_far = False
        self._next_far = 0.0

    def take(self, most: int) -> list[MemberRecord]:
        """Up to `most` further members; raises StorageError where the storage does not answer."""
        if not self._queue:
            self._look()
        return [self._queue.popleft() for _ in range(min(most, len(self._queue)))]

    def give_back(self, records: list[MemberRecord]) -> None:
        """Have `take` give these again."""
        self._queue.extendleft(reversed(records))

    def _look(self) -> None:
        if self._near is not None:
            self._grown(self._local(self._near.root) if self._walked_near else self._walk(self._near, BUNDLES))
            self._walked_near = True
        if self._far is not None:
            self._grown(self._mirrored())
            now = time.monotonic()
            if now >= self._next_far:
                self._next_far = now + FAR_S
                self._look_far(self._far)

    def _look_far(self, far: Readable) -> None:
        try:
            folders = _days() if self._walked_far else (BUNDLES,)
            self._grown(entry for folder in folders for entry in self._walk(far, folder))
            self._walked_far = True
        except StorageError as error:
            if self._near is None:
                raise
            log.warning("recent arrivals are those of this host only: %s", error)
            self._next_far = time.monotonic() + AWAY_S

    def _walk(self, storage: Readable, prefix: str) -> Iterator[tuple[str, int]]:
        whole = prefix == BUNDLES
        for entry in SealedFolders(storage, self._state_dir).entries(self._sealed) if whole else storage.walk(prefix):
            if entry.path.endswith(_JOURNAL):
                bundle = entry.path.removesuffix(_JOURNAL) + ".tar"
                if bundle not in self._sealed:
                    yield bundle, entry.size

    def _local(self, root: Path) -> Iterator[tuple[str, int]]:
        for day in _days():
            if self._changed(f"{root}/{day}"):
                for name in _names(root / day):
                    bundle = f"{day}/{name.removesuffix(_JOURNAL)}.tar"
                    if bundle not in self._sealed:
                        self._open.add(bundle)
        for bundle in sorted(self._open):
            size = _size(f"{root}/{bundle.removesuffix('.tar')}{_JOURNAL}")
            if size:
                yield bundle, size

    def _mirrored(self) -> Iterator[tuple[str, int]]:
        for name in _names(self._mirrors):
            identity = name.removesuffix(_JOURNAL)
            yield bundle_of(identity), _size(f"{self._mirrors}/{name}")

    def _changed(self, folder: str) -> bool:
        try:
            stamp = os.stat(folder).st_mtime_ns  # noqa: PTH116  as in _size
        except FileNotFoundError:
            return False
        before = self._stamps.get(folder)
        read_at = time.time_ns()
        self._stamps[folder] = stamp, read_at
        return before is None or before[0] != stamp or before[1] - stamp < COARSE_NS

    def _grown(self, sizes: Iterator[tuple[str, int]]) -> None:
        """Queue what the journals have beyond what was read of them."""
        for bundle, size in list(sizes):
            if bundle in self._sealed:
                continue
            self._open.add(bundle)
            position = self._positions.get(bundle, 0)
            if size > position:
                try:
                    records, end, sealed = self._landed.records(bundle, from_byte=position, unpublished=True)
                except BundleDamaged as error:  # the others go on
                    log.warning("recent arrivals leave out a bundle: %s", error)
                    self._sealed.add(bundle)
                    self._open.discard(bundle)
                    continue
                self._queue.extend(records)
                self._positions[bundle] = end
                if sealed:
                    self._sealed.add(bundle)
                    self._open.discard(bundle)


def _sides(storage: Readable) -> tuple[LocalStorage | None, Readable | None]:
    """What is watched by its folders, and what is asked now and then."""
    if isinstance(storage, SpoolFirst):
        return storage.spool, storage.storage
    return (storage, None) if isinstance(storage, LocalStorage) else (None, storage)


def _days() -> tuple[str, str]:
    """The folders of yesterday and today."""
    return _days_of(int(time.time() // 86_400))


@functools.lru_cache(2)
def _days_of(day: int) -> tuple[str, str]:
    now = datetime.fromtimestamp(day * 86_400, timezone.utc)
    return f"{BUNDLES}/{now - timedelta(days=1):%Y/%m/%d}", f"{BUNDLES}/{now:%Y/%m/%d}"


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.name.endswith(_JOURNAL))
    except FileNotFoundError:
        return []


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116  a few per query: Path costs ten times as much
    except FileNotFoundError:
        return 0
