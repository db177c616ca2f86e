"""Which files of `instances` hold which study and which instance, as an index and its refresh say.

Delta's own statistics cut UIDs at 32 characters: the root of one vendor is that long.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import duckdb

from sphere.catalog.overlay import among
from sphere.catalog.rows import RowStore

SOURCES = ("base", "newer")
"""The databases that an index consists of: the file, and what was refreshed since."""


@dataclass(frozen=True)
class FileMap:
    """The files of one version of `instances`, by the numbers that the tables of the index use."""

    names: Mapping[int, str]
    sources: tuple[str, ...] = SOURCES

    @classmethod
    def read(cls, db: duckdb.DuckDBPyConnection, sources: tuple[str, ...] = SOURCES) -> FileMap:
        """The files that the databases `sources` name; each may take away what the one before has."""
        names: dict[int, str] = {}
        for source in sources:
            for (gone,) in db.execute(f"SELECT id FROM {source}.gone_files").fetchall():
                names.pop(gone, None)
            names |= dict(db.execute(f"SELECT id, file FROM {source}.files").fetchall())
        return cls(names, sources)

    def all(self) -> list[str]:
        """Every file."""
        return sorted(self.names.values())

    def of_studies(
        self, db: duckdb.DuckDBPyConnection, study_instance_uids: Sequence[str], rows: RowStore | None = None
    ) -> list[str]:
        """The files that hold any of the studies; with the `rows` of the base, what that says is looked up there."""
        condition, values = among("StudyInstanceUID", study_instance_uids)
        ids = rows.files_of(rows.studies(study_instance_uids)) if rows else set()
        for source in self.sources[1:] if rows else self.sources:
            found = db.execute(f"SELECT id FROM {source}.study_files WHERE {condition}", values).fetchall()
            ids.update(row[0] for row in found)
        return self.named(ids)

    def of_instances(self, db: duckdb.DuckDBPyConnection, sop_instance_uids: Sequence[str]) -> list[str]:
        """The files that hold any of the instances (rarely one more, as hashes are compared)."""
        uids = list(sop_instance_uids)
        hashes = db.execute("SELECT hash(u) FROM (SELECT unnest(?::VARCHAR[]) AS u)", [uids]).fetchall()
        listed = ", ".join(str(int(row[0])) for row in hashes)
        ids: set[int] = set()
        for source in self.sources if listed else ():
            found = db.execute(f"SELECT id FROM {source}.sop_files WHERE hash IN ({listed})").fetchall()
            ids.update(row[0] for row in found)
        return self.named(ids)

    def named(self, ids: Iterable[int]) -> list[str]:
        """The files with some numbers, as far as they are still there."""
        return sorted(self.names[one] for one in ids if one in self.names)
