"""What landed and is not catalogued yet: found in the journals, so that it can be retrieved at once.

Cost of a look: one listing of the folder of bundles, and the journal lines since the last look. The lines that are not
catalogued stay in memory, about 1 kB each; those of a batch are let go when extraction has committed it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sphere.catalog.service import StoredInstance
from sphere.catalog.tables import CatalogTables
from sphere.conf.settings import Settings
from sphere.ingest.journal import Landed
from sphere.ingest.records import MemberRecord
from sphere.ingest.storage.base import Storage


@dataclass(slots=True)
class _Tail:
    """The lines of a bundle's journal from byte `begin` to byte `end`: those that no committed batch covers."""

    begin: int
    end: int
    records: list[MemberRecord] = field(default_factory=list)


class Arrivals:
    """One per process, shared by its threads."""

    def __init__(self, settings: Settings, storage: Storage) -> None:
        self._landed = Landed(storage, settings.archive.state_dir)
        self._tables = CatalogTables(settings)
        self._version: int | None = None  # of the table `bundles` that `_done` is of
        self._done: dict[str, tuple[int, bool]] = {}  # catalogued bytes of a bundle's journal, and whether all
        self._tails: dict[str, _Tail] = {}
        self._lock = threading.Lock()

    def instances(self) -> Iterator[StoredInstance]:
        """Every member that is not catalogued, in the order in which they became durable.

        Ask before the catalog is asked: what is missing here is then to be found there. Members that turn out not to
        be instances are among them until extraction says so. Raises StorageError and CatalogError.
        """
        with self._lock:
            self._look()
            found = [tail.records[:] for tail in self._tails.values()]
        return (_stored(record) for records in found for record in records)

    def _look(self) -> None:
        self._take_version()
        complete = {bundle for bundle, (_, sealed) in self._done.items() if sealed}
        tails: dict[str, _Tail] = {}
        for state in self._landed.bundles(skip=complete):
            begin = self._done.get(state.bundle, (0, False))[0]
            tail = self._tails.get(state.bundle)
            if tail is None or tail.begin != begin:
                tail = _Tail(begin, begin)
            records, tail.end, _ = self._landed.records(state.bundle, from_byte=tail.end, unpublished=True)
            tail.records += records
            tails[state.bundle] = tail
        self._tails = tails

    def _take_version(self) -> None:
        if self._version is not None and not self._tables.has_moved("bundles", self._version):
            return
        snapshot = self._tables.snapshot("bundles")
        self._version = snapshot.version if snapshot else -1
        if snapshot is None or not snapshot.files:
            self._done = {}
            return
        connection = self._tables.connect(Path(":memory:"), read_only=False, memory_limit="64MB", threads=1)
        with connection:
            rows = connection.execute(
                "SELECT bundle, journal_bytes, sealed FROM read_parquet(?)", [list(snapshot.files)]
            ).fetchall()
        self._done = {bundle: (size, bool(sealed)) for bundle, size, sealed in rows}


def _stored(record: MemberRecord) -> StoredInstance:
    return StoredInstance(
        StudyInstanceUID=record.StudyInstanceUID,
        SeriesInstanceUID=record.SeriesInstanceUID,
        SOPInstanceUID=record.SOPInstanceUID,
        SOPClassUID=record.SOPClassUID,
        transfer_syntax_uid=record.TransferSyntaxUID,
        bundle=record.bundle,
        offset=record.offset,
        length=record.length,
        dataset_offset=record.dataset_offset,
        pixel_offset=None,
        sha256=record.sha256,
    )
