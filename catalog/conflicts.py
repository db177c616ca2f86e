"""The versions of instances that `conflicts` names: what a recent arrival must be settled against."""

from __future__ import annotations

from collections.abc import Sequence

import duckdb

from sphere.catalog.tables import CatalogTables
from sphere.catalog.versions import place
from sphere.ingest.journal import Landed
from sphere.ingest.records import MemberRecord

_SQL = (
    "SELECT DISTINCT uid, p.bundle, p.place FROM (SELECT SOPInstanceUID AS uid, unnest(["
    "{'bundle': bundle, 'place': \"offset\"}, {'bundle': kept_bundle, 'place': kept_offset}, "
    "{'bundle': other_bundle, 'place': other_offset}]) AS p FROM read_parquet(?, union_by_name = true) "
    "WHERE kind = 'SOP_INSTANCE' AND SOPInstanceUID IN (SELECT unnest(?)))"
)


class Conflicts:
    """Reads the newest `conflicts`, and the journals of the bundles that it names. For the rare instance that came with
    other bytes."""

    def __init__(self, tables: CatalogTables, connection: duckdb.DuckDBPyConnection, landed: Landed) -> None:
        self._tables = tables
        self._db = connection.cursor()
        self._landed = landed

    def versions(self, sop_instance_uids: Sequence[str]) -> dict[str, list[MemberRecord]]:
        """The known versions of each instance. Raises CatalogError and StorageError."""
        snapshot = self._tables.snapshot("conflicts")
        if snapshot is None or not snapshot.files:
            return {}
        rows = self._db.execute(_SQL, [list(snapshot.files), list(sop_instance_uids)]).fetchall()
        wanted = {(bundle, offset): uid for uid, bundle, offset in rows}
        found: dict[str, list[MemberRecord]] = {}
        for bundle in sorted({bundle for bundle, _ in wanted}):
            for record in self._landed.records(bundle)[0]:
                if uid := wanted.get(place(record)):
                    found.setdefault(uid, []).append(record)
        return found
