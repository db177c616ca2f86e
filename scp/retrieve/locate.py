"""From what is asked for to where it lies: the catalog, and what landed since the last extraction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from sphere.catalog.query import Query
from sphere.conf.settings import Snapshot
from sphere.scp.retrieve.identifier import Selection

if TYPE_CHECKING:
    from sphere.catalog.asof import AsOf
    from sphere.catalog.service import Match, StoredInstance


class Catalog(Protocol):
    """What the query service does for us; recent arrivals are among its answers."""

    def find(self, query: Query, *, as_of: AsOf | None = None) -> Iterator[Match]:
        """The entities that match."""

    def lookup_instances(
        self,
        *,
        study: Sequence[str] = (),
        series: Sequence[str] = (),
        sop: Sequence[str] = (),
        as_of: AsOf | None = None,
    ) -> Iterator[StoredInstance]:
        """Where instances are, in the order of the bundles."""


class Locator:
    """Finds the instances of a selection; asked under an AE title of `snapshots`, in an earlier state of the catalog.

    One per process, shared by its threads.
    """

    def __init__(self, catalog: Catalog, snapshots: Sequence[Snapshot] = ()) -> None:
        self._catalog = catalog
        self._as_of = {snapshot.ae_title.strip(): snapshot.as_of for snapshot in snapshots}

    def locate(self, selection: Selection, called: str = "") -> list[StoredInstance]:
        """Each instance once, in the order of the bundles. Raises CatalogError and StorageError."""
        as_of = self._as_of.get(called)
        studies = selection.study
        if selection.patient:
            studies = tuple(self._studies_of(selection, as_of))
            if not studies:
                return []
        found = self._catalog.lookup_instances(study=studies, series=selection.series, sop=selection.sop, as_of=as_of)
        return list({one.SOPInstanceUID: one for one in found}.values())

    def _studies_of(self, selection: Selection, as_of: AsOf | None) -> Iterator[str]:
        """Studies with exactly this PatientID: a query would take * and ? in it for wild cards."""
        match: dict[str, object] = {"PatientID": selection.patient}
        if selection.study:
            match["StudyInstanceUID"] = list(selection.study)
        query = Query.build("STUDY", match, return_keys=("StudyInstanceUID",), model="PATIENT_ROOT")
        for study in self._catalog.find(query, as_of=as_of):
            identifier = study.identifier()
            if str(identifier.get("PatientID") or "").strip() == selection.patient:
                yield str(identifier.StudyInstanceUID)
