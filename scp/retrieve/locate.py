"""From what is asked for to where it lies: the catalog, and what landed since the last extraction."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Protocol

from sphere.catalog.query import Query
from sphere.catalog.service import Match, StoredInstance
from sphere.conf.errors import StorageError
from sphere.conf.settings import Settings
from sphere.ingest.header import HeaderReader, Rejected
from sphere.ingest.storage.base import Storage
from sphere.scp.retrieve.identifier import Selection

UID = re.compile(r"[0-9.]{1,64}")  # others are quarantined by extraction, and can be no part of a command
PREFIX = 1 << 16  # bytes of an instance read to find its PatientID


class Catalog(Protocol):
    """What the query service does for us."""

    def find(self, query: Query) -> Iterator[Match]:
        """The entities that match."""

    def lookup_instances(
        self, *, study: Sequence[str] = (), series: Sequence[str] = (), sop: Sequence[str] = ()
    ) -> Iterator[StoredInstance]:
        """Where instances are, in the order of the bundles."""


class Waiting(Protocol):
    """What knows the members that are not catalogued."""

    def instances(self) -> Iterator[StoredInstance]:
        """All of them, in the order of their arrival."""


class Locator:
    """Finds the instances of a selection. One per process, shared by its threads."""

    def __init__(self, settings: Settings, storage: Storage, catalog: Catalog, waiting: Waiting) -> None:
        self._storage = storage
        self._catalog = catalog
        self._waiting = waiting
        self._replace = settings.ingest.on_conflict == "replace"
        self._max_header = settings.extract.max_header_mib << 20

    def locate(self, selection: Selection) -> list[StoredInstance]:
        """Each instance once, in the order of the bundles. Raises CatalogError and StorageError.

        Of a SOPInstanceUID that came with different bytes, the version that `ingest.on_conflict` decides for; a
        catalogued one holds until the next extraction. PatientID of what is not catalogued is read from the header of
        one instance of each study.
        """
        arrived = list(self._arrived(selection))  # before the catalog is asked: what leaves the one is in the other
        found = {one.SOPInstanceUID: one for one in self._catalogued(selection)}
        patients: dict[str, str] = {}
        recent: dict[str, StoredInstance] = {}
        for one in arrived:
            if one.SOPInstanceUID in found or (one.SOPInstanceUID in recent and not self._replace):
                continue
            if selection.patient and self._patient_of(one, patients) != selection.patient:
                continue
            recent[one.SOPInstanceUID] = one
        every = [*found.values(), *recent.values()]
        return sorted(every, key=lambda one: (one.bundle, one.offset)) if recent else every

    def _catalogued(self, selection: Selection) -> Iterator[StoredInstance]:
        studies = selection.study
        if selection.patient:
            studies = tuple(self._studies_of(selection))
            if not studies:
                return iter(())
        return self._catalog.lookup_instances(study=studies, series=selection.series, sop=selection.sop)

    def _studies_of(self, selection: Selection) -> Iterator[str]:
        """Studies with exactly this PatientID: a query would take * and ? in it for wild cards."""
        match: dict[str, object] = {"PatientID": selection.patient}
        if selection.study:
            match["StudyInstanceUID"] = list(selection.study)
        query = Query.build("STUDY", match, return_keys=("StudyInstanceUID",), model="PATIENT_ROOT")
        for study in self._catalog.find(query):
            identifier = study.identifier()
            if str(identifier.get("PatientID") or "").strip() == selection.patient:
                yield str(identifier.StudyInstanceUID)

    def _arrived(self, selection: Selection) -> Iterator[StoredInstance]:
        wanted = [
            (keyword, frozenset(uids))
            for keyword, uids in (
                ("StudyInstanceUID", selection.study),
                ("SeriesInstanceUID", selection.series),
                ("SOPInstanceUID", selection.sop),
            )
            if uids
        ]
        for one in self._waiting.instances():
            if UID.fullmatch(one.SOPInstanceUID) and all(getattr(one, keyword) in uids for keyword, uids in wanted):
                yield one

    def _patient_of(self, one: StoredInstance, known: dict[str, str]) -> str:
        if one.StudyInstanceUID not in known:
            known[one.StudyInstanceUID] = self._read_patient(one)
        return known[one.StudyInstanceUID]

    def _read_patient(self, one: StoredInstance) -> str:
        def fetch(offset: int, length: int) -> bytes:
            return self._storage.read(one.bundle, one.offset + offset, min(length, one.length - offset))

        try:
            header = HeaderReader(max_header=self._max_header).read(
                fetch(0, min(PREFIX, one.length)), size=one.length, fetch=fetch
            )
        except StorageError:
            return ""
        return "" if isinstance(header, Rejected) else str(header.values.get("PatientID") or "").strip()
