"""What an index says of itself: the versions of the tables that it was made from, and whether these are the newest.

So a process opens an index that somebody made, and learns that it is the newest, without reading a Delta log.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import duckdb
import orjson

from sphere.catalog.schema import TABLES
from sphere.catalog.tables import CatalogTables, Snapshot

Snapshots = Mapping[str, Snapshot | None]


@dataclass(frozen=True, slots=True)
class Seen:
    """A version of a table; `commit` as of Snapshot."""

    table_id: str
    version: int
    commit: str


@dataclass(frozen=True, slots=True)
class Note:
    """Of one index: the name of its base ("": it is one); whether the roll-ups were those of the instances; the tables
    in the order in which they are looked at (None: there was none), and the columns of `instances`."""

    base: str
    settled: bool
    tables: Mapping[str, Seen | None]
    columns: tuple[str, ...]

    @classmethod
    def of(cls, snapshots: Snapshots, *, settled: bool, base: str) -> Note:
        """What an index that is made from the snapshots is to say."""
        tables = {name: Seen(s.table_id, s.version, s.commit) if s else None for name, s in snapshots.items()}
        instances = snapshots["instances"]
        columns = sorted(instances.columns) if instances else TABLES["instances"].schema.names
        return cls(base, settled, tables, tuple(columns))

    def write(self, db: duckdb.DuckDBPyConnection) -> None:
        """Write it down in a database that has none."""
        db.execute("CREATE TABLE made (note VARCHAR)")
        db.execute("INSERT INTO made VALUES (?)", [orjson.dumps(self).decode()])

    @classmethod
    def read(cls, db: duckdb.DuckDBPyConnection, source: str) -> Note:
        """That of the attached database `source`; raises duckdb.Error."""
        said = orjson.loads(db.execute(f"SELECT note FROM {source}.made").fetchall()[0][0])
        tables = {name: Seen(**seen) if seen else None for name, seen in said["tables"].items()}
        return cls(said["base"], said["settled"], tables, tuple(said["columns"]))

    @property
    def versions(self) -> Mapping[str, int]:
        """The version of each table; -1 where there was none."""
        return {name: seen.version if seen else -1 for name, seen in self.tables.items()}

    def is_newest(self, tables: CatalogTables) -> bool:
        """Whether the tables still are what they were. False where their logs no longer tell.

        Raises CatalogError where the storage does not answer.
        """
        return not any(
            tables.has_moved(name, seen.version if seen else -1)
            or (seen and not (seen.commit and tables.commit(name, seen.version) == seen.commit))
            for name, seen in self.tables.items()
        )


def attach(db: duckdb.DuckDBPyConnection, path: Path, name: str) -> None:
    """Attach an index to read it; raises FileNotFoundError and duckdb.Error."""
    if not path.exists():
        raise FileNotFoundError(path)
    quoted = str(path).replace("'", "''")
    db.execute(f"ATTACH '{quoted}' AS {name} (READ_ONLY)")


def note_of(path: Path) -> Note:
    """What the index at `path` says; raises FileNotFoundError and duckdb.Error."""
    with _READING, closing(_reader().cursor()) as db:
        try:
            attach(db, path, "noted")
            try:
                return Note.read(db, "noted")
            finally:
                db.execute("DETACH noted")
        except duckdb.Error:
            _reader.cache_clear()  # a damaged file may leave nothing of the database that read it
            raise


_READING = threading.Lock()


@functools.cache
def _reader() -> duckdb.DuckDBPyConnection:
    """One database for all: making one takes ten times as long as reading a note."""
    return duckdb.connect(config={"threads": 1, "memory_limit": "64MB"})


def parts_of(path: Path, note: Note) -> tuple[Path, ...]:
    """The files that an index consists of: a base, or a base and the refresh at `path`."""
    return (path.with_name(note.base), path) if note.base else (path,)
