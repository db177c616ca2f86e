"""What landed and when, from the journals as they grow: for people who watch it."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sphere.ingest.journal import BundleState, Landed
from sphere.ingest.records import MemberRecord
from sphere.ingest.storage.base import Readable

FRESH_S: Final = 2.0  # seconds for which a look is good enough
SHARE: Final = 20  # a look is not repeated before so many times the time that it took: storages may be slow to list
RECENT: Final = 8  # sealed bundles that are read for the arrivals before this process began
STUDIES: Final = 200  # that are remembered


@dataclass(slots=True)
class StudyArrival:
    """Instances of a study that came from one sender; sizes in bytes, times ISO 8601 (UTC)."""

    study: str  # "" where the bytes did not say
    source_aet: str
    origin: str
    instances: int
    bytes: int
    first_at: str
    last_at: str


@dataclass(frozen=True, slots=True)
class Landing:
    """All bundles; `studies` the latest first."""

    bundles: int = 0
    open: int = 0
    bytes: int = 0
    members: int = 0
    studies: tuple[StudyArrival, ...] = ()


class Arrivals:
    """The arrivals of an archive. Safe to share between threads: one looks, the others take what was seen last."""

    def __init__(self, storage: Readable, state_dir: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._landed, self._clock = Landed(storage, state_dir), clock
        self._lock = threading.Lock()
        self._seen = Landing()
        self._due = 0.0
        self._sealed: dict[str, BundleState] = {}
        self._places: dict[str, tuple[int, int, int]] = {}  # of open bundles: journal read, members, where they end
        self._studies: OrderedDict[tuple[str, str, str], StudyArrival] = OrderedDict()

    def look(self) -> Landing:
        """What is there, seen FRESH_S ago at most where looking is quick; raises StorageError."""
        with self._lock:
            if self._clock() >= self._due:
                began = self._clock()
                self._seen = self._look()
                self._due = self._clock() + max(FRESH_S, SHARE * (self._clock() - began))
            return self._seen

    def _look(self) -> Landing:
        states = list(self._landed.bundles(skip=self._sealed.keys()))
        sealed = [state.bundle for state in states if state.sealed]
        passed_over = set(sealed[:-RECENT]) - self._places.keys()
        for state in states:
            if state.bundle not in passed_over:
                self._read(state)
            if state.sealed:
                self._sealed[state.bundle] = state
                self._places.pop(state.bundle, None)
        opened = [state for state in states if not state.sealed]
        known = self._sealed.values()
        return Landing(
            bundles=len(known) + len(opened),
            open=len(opened),
            bytes=sum(state.size for state in known) + sum(end for _, _, end in self._places.values()),
            members=sum(state.records or 0 for state in known) + sum(count for _, count, _ in self._places.values()),
            studies=tuple(reversed(self._studies.values())),
        )

    def _read(self, state: BundleState) -> None:
        """Take what a bundle's journal says that was not read before."""
        place, count, end = self._places.get(state.bundle, (0, 0, 0))
        records, place, _ = self._landed.records(state.bundle, from_byte=place, unpublished=True)
        end = max([end, *(record.offset + record.length for record in records)])  # zeros may follow (Appender.prepare)
        self._places[state.bundle] = place, count + len(records), end
        for record in records:
            self._add(record)

    def _add(self, record: MemberRecord) -> None:
        key = (record.StudyInstanceUID, record.source_aet, record.origin)
        at = record.received_at.isoformat(timespec="milliseconds")
        study = self._studies.get(key)
        if study is None:
            origin = record.origin.partition(":")[0]  # not the path of an import, nor the name of who stores
            study = self._studies[key] = StudyArrival(key[0], record.source_aet, origin, 0, 0, at, at)
        study.instances += 1
        study.bytes += record.length
        study.last_at = max(study.last_at, at)
        self._studies.move_to_end(key)
        if len(self._studies) > STUDIES:
            self._studies.popitem(last=False)
