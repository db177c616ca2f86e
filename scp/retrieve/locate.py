"""From what is asked for to where it lies: the catalog, and what landed since the last extraction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from sphere.catalog.query import Query
from sphere.catalog.service import Match, StoredInstance
from sphere.scp.retrieve.identifier import Selection


class Catalog(Protocol):
    """What the query service does for us; recent arrivals are among its answers."""

    def find(self, query: Query) -> Iterator[Match]:
        """The entities that match."""

    def lookup_instances(
        self, *, study: Sequence[str] = (), series: Sequence[str] = (), sop: Sequence[str] = ()
    ) -> Iterator[StoredInstance]:
        """Where instances are, in the order of the bundles."""


class Locator:
    """Finds the instances of a selection. One per process, shared by its threads."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def locate(self, selection: Selection) -> list[StoredInstance]:
        """Each instance once, in the order of the bundles. Raises CatalogError and StorageError."""
        studies = selection.study
        if selection.patient:
            studies = tuple(self._studies_of(selection))
            if not studies:
                return []
        found = self._catalog.lookup_instances(study=studies, series=selection.series, sop=selection.sop)
        return list({one.SOPInstanceUID: one for one in found}.values())

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
