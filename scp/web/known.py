"""What was looked up of whole series a moment ago: viewers ask for their instances and frames one by one."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, Protocol

from sphere.catalog.asof import AsOf
from sphere.catalog.service import StoredInstance

FRESH_S: Final = 5.0  # seconds for which what was looked up is used; what is not in it is looked up at once
SERIES: Final = 8  # that are remembered
INSTANCES: Final = 20_000  # of a series
HEADERS: Final = 8 << 20  # characters of the headers of a series


class Catalog(Protocol):
    """What the query service does for us."""

    def lookup_headers(
        self, *, study: str, series: str = "", sop: str = "", as_of: AsOf | None = None
    ) -> Iterator[tuple[StoredInstance, str]]:
        """Instances with their headers as DICOM JSON."""

    def deletions(self) -> str:
        """A text that is another one after every deletion and its undoing."""


@dataclass(slots=True)
class _Series:
    read_at: float
    deletions: str
    instances: dict[str, StoredInstance] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)


class KnownSeries:
    """Instances of series by UID, and their headers as far as they are small. Safe to share between threads."""

    def __init__(self, catalog: Catalog, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._catalog, self._clock = catalog, clock
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[str, str], _Series] = OrderedDict()

    def instance(self, study: str, series: str, sop: str) -> StoredInstance | None:
        """An instance of a series; None where there is none. Raises CatalogError."""
        with self._lock:
            known, deletions = self._known.get((study, series)), self._catalog.deletions()
            if known is not None and (self._clock() - known.read_at > FRESH_S or known.deletions != deletions):
                known = None
            if known is None or sop not in known.instances:
                known = self._read(study, series, sop, deletions)
            return known.instances.get(sop)

    def header(self, instance: StoredInstance) -> str:
        """The header of an instance, as DICOM JSON. Raises CatalogError."""
        with self._lock:
            known = self._known.get((instance.StudyInstanceUID, instance.SeriesInstanceUID))
            same = known is not None and known.instances.get(instance.SOPInstanceUID) == instance
            if same and known and (text := known.headers.get(instance.SOPInstanceUID)):
                return text
        found = self._catalog.lookup_headers(
            study=instance.StudyInstanceUID, series=instance.SeriesInstanceUID, sop=instance.SOPInstanceUID
        )
        return next((header for one, header in found if one.sha256 == instance.sha256), "{}")

    def _read(self, study: str, series: str, sop: str, deletions: str) -> _Series:
        """The whole series, as far as it may be remembered; if that does not reach the instance, it alone."""
        known, size = _Series(self._clock(), deletions), 0
        for one, header in self._catalog.lookup_headers(study=study, series=series):
            if len(known.instances) >= INSTANCES:
                break
            known.instances[one.SOPInstanceUID] = one
            size += len(header)
            if size <= HEADERS:
                known.headers[one.SOPInstanceUID] = header
        if len(known.instances) >= INSTANCES and sop not in known.instances:
            for one, _ in self._catalog.lookup_headers(study=study, series=series, sop=sop):
                known.instances[one.SOPInstanceUID] = one
        self._known[study, series] = known
        self._known.move_to_end((study, series))
        while len(self._known) > SERIES:
            self._known.popitem(last=False)
        return known
