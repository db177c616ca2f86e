"""Rows that stand in place of an index's: whole patients, with all their studies and series.

An index is a large file that is never written again, and a small set of rows beside it, the *overlay*. A patient is in
one of the two with everything that belongs to it, so that a query is put to each as it is and no join goes across: what
the file says of the studies and patients that the overlay `touched` is dropped (see sphere.catalog.layers). Both the
refresh of an index and the recent arrivals keep their rows so.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa

from sphere.catalog.rollup import optional_columns, roll_up_sql, source_columns
from sphere.catalog.rows import RowStore
from sphere.catalog.schema import TABLES

SCHEMA = "overlay"
ROLLED = ("patients", "studies", "series")
VALUES = ("StudyInstanceUID", "PatientID", "AccessionNumber")
FEW = 100
"""Keys up to which a condition lists them, so that indexes and zone maps are used; more are joined."""
LOOKED_UP = 2000
"""Keys up to which looking them up, FEW at a time, is less work than a scan of a million rows."""
SCANNED_FOR_ONE = 1000
"""Studies of an index of which a scan takes as long as fetching the rows of one."""

NUMBERED = 200
"""Studies up to which fetching their rows by key is less work than taking rows by numbers that are known."""

Selected = Callable[[str], str]
"""From a column of a roll-up to the expression by which an index holds it."""


@dataclass(frozen=True)
class Touched:
    """The keys whose rows in the file do not count any more, as of one moment.

    `values` are the StudyInstanceUIDs, PatientIDs and AccessionNumbers of what is in the overlay, and of what was.
    """

    studies: frozenset[str] = frozenset()
    patients: frozenset[str] = frozenset()
    values: frozenset[str] = frozenset()

    def __or__(self, other: Touched) -> Touched:
        return Touched(self.studies | other.studies, self.patients | other.patients, self.values | other.values)


class Published:
    """What the overlay replaces, told in step with its commits: a reader that was told the same before and after it
    began to read has read just that. Thread-safe."""

    def __init__(self, touched: Touched) -> None:
        self._touched: Touched | None = touched
        self._lock = threading.Lock()

    def now(self) -> Touched:
        """What is replaced; waits while that changes."""
        while (touched := self._touched) is None:
            with self._lock:
                continue
        return touched

    @contextmanager
    def changing(self, touched: Touched) -> Iterator[None]:
        """Commit within: from now on it is `touched`, unless the commit fails."""
        with self._lock:
            before, self._touched = self._touched, None
            try:
                yield
                before = Touched(touched.studies, touched.patients, touched.values)
            finally:
                self._touched = before


def among(column: str, keys: Sequence[str]) -> tuple[str, list[Any]]:
    """The condition that a column has one of the values, which are bound."""
    if len(keys) == 1:
        return f"{column} = ?", [keys[0]]
    if len(keys) <= FEW:
        return (f"{column} IN ({', '.join('?' * len(keys))})", list(keys)) if keys else ("false", [])
    return f"{column} IN (SELECT unnest(?::VARCHAR[]))", [list(keys)]


def among_pieces(column: str, keys: Sequence[str]) -> Iterator[tuple[str, list[Any]]]:
    """Conditions that together find the rows that have one of the values, each once, in a table where the column has an
    index: by it, or where keys are many, by one scan."""
    at_once = FEW if len(keys) <= LOOKED_UP else len(keys)
    for start in range(0, len(keys), at_once):
        yield among(column, keys[start : start + at_once])


def create(db: duckdb.DuckDBPyConnection, like: str) -> None:
    """An empty overlay, its tables made like those of the schema `like`."""
    db.execute(f"CREATE SCHEMA {SCHEMA}")
    for name in ROLLED:
        db.execute(f"CREATE TABLE {SCHEMA}.{name} AS SELECT * FROM {like}.{name} LIMIT 0")
    db.execute(f"CREATE TABLE {SCHEMA}.touched (StudyInstanceUID VARCHAR)")
    db.execute(f"CREATE TABLE {SCHEMA}.touched_patients (patient_key VARCHAR)")


def copy(db: duckdb.DuckDBPyConnection, source: str) -> Touched:
    """Add all rows of the overlay in the schema `source`."""
    for name in (*ROLLED, "touched", "touched_patients"):
        db.execute(f"INSERT INTO {SCHEMA}.{name} SELECT * FROM {source}.{name}")
    return touched(db, source)


def touched(db: duckdb.DuckDBPyConnection, schema: str = SCHEMA) -> Touched:
    """What the overlay in a schema replaces."""
    studies = db.execute(f"SELECT StudyInstanceUID FROM {schema}.touched").fetchall()
    patients = db.execute(f"SELECT patient_key FROM {schema}.touched_patients").fetchall()
    values = _values(db, f"{schema}.studies") | {row[0] for row in studies}
    return Touched(frozenset(row[0] for row in studies), frozenset(row[0] for row in patients), values)


def _values(
    db: duckdb.DuckDBPyConnection, source: str, condition: str = "true", bound: Sequence[Any] = ()
) -> frozenset[str]:
    """What `Touched.values` holds of some studies."""
    listed = ", ".join(VALUES)
    rows = db.execute(f"SELECT {listed} FROM {source} WHERE {condition}", list(bound)).fetchall()
    return frozenset(value for row in rows for value in row if value is not None)


def replace(
    db: duckdb.DuckDBPyConnection,
    before: Touched,
    affected: Sequence[str],
    *,
    series: pa.Table,
    studies: pa.Table,
    selected: Selected,
    rows: RowStore | None = None,
) -> Touched:
    """Put in the new rows of the studies `affected` (none: it is gone), and all else of the patients concerned.

    With the `rows` of the file, what is sought there is found by them. Returns what the overlay replaces then. To be
    called within a transaction.
    """
    condition, values = among("StudyInstanceUID", affected)
    keys = {
        row[0] for row in db.execute(f"SELECT patient_key FROM {SCHEMA}.studies WHERE {condition}", values).fetchall()
    }
    keys |= {key for uid, key in _patients_of(db, affected, rows) if uid not in before.studies}
    keys |= set(studies["patient_key"].to_pylist())
    now = before | adopt(db, sorted(keys - before.patients), rows)
    new = sorted(set(affected) - now.studies)
    if new:
        db.execute(f"INSERT INTO {SCHEMA}.touched SELECT unnest(?::VARCHAR[])", [new])
        now |= Touched(frozenset(new))
    for name, new_rows in (("series", series), ("studies", studies)):
        db.execute(f"DELETE FROM {SCHEMA}.{name} WHERE {condition}", values)
        if len(new_rows):
            db.register("incoming_rows", new_rows)
            filled = [column for column in TABLES[name].schema.names if new_rows[column].null_count < len(new_rows)]
            _insert(db, name, "incoming_rows", filled, selected)
            db.unregister("incoming_rows")
    _roll_up_patients(db, sorted(keys), selected)
    return now | Touched(values=_values(db, f"{SCHEMA}.studies", condition, values) | frozenset(affected))


def _patients_of(
    db: duckdb.DuckDBPyConnection, uids: Sequence[str], rows: RowStore | None
) -> Iterable[tuple[str, str]]:
    """StudyInstanceUID and patient_key of those of some studies that the file has."""
    if rows is not None:
        found = rows.studies(uids)
        columns = (rows.tables["studies"].values(name, found) for name in ("StudyInstanceUID", "patient_key"))
        return zip(*columns, strict=True)
    condition, values = among("StudyInstanceUID", uids)
    return db.execute(f"SELECT StudyInstanceUID, patient_key FROM base.studies WHERE {condition}", values).fetchall()


def adopt(db: duckdb.DuckDBPyConnection, keys: Sequence[str], rows: RowStore | None) -> Touched:
    """Take over patients from the file, with everything of theirs; unknown ones have nothing there."""
    if not keys:
        return Touched()
    found = [
        row
        for of_keys, values in among_pieces("patient_key", keys)
        for row in db.execute(f"SELECT StudyInstanceUID FROM base.studies WHERE {of_keys}", values).fetchall()
    ]
    uids, taken = sorted(row[0] for row in found), frozenset[str]()
    for name in ("studies", "series"):
        _take_over(db, name, uids, rows)
    if uids:
        of_uids, bound = among("StudyInstanceUID", uids)
        db.execute(f"INSERT INTO {SCHEMA}.touched SELECT unnest(?::VARCHAR[])", [uids])
        taken = _values(db, f"{SCHEMA}.studies", of_uids, bound)
    db.execute(f"INSERT INTO {SCHEMA}.touched_patients SELECT unnest(?::VARCHAR[])", [list(keys)])
    return Touched(frozenset(uids), frozenset(keys), taken)


def _take_over(db: duckdb.DuckDBPyConnection, name: str, uids: Sequence[str], rows: RowStore | None) -> None:
    """Add the rows of some studies, as the file has them.

    To fetch a row by itself costs each of its columns. So where there are many, the rows are found in `rows` or by a
    scan of their key, and then taken by their numbers: a sixth of what a scan costs that reads all columns.
    """
    insert = f"INSERT INTO {SCHEMA}.{name} SELECT * FROM base.{name}"
    if rows is not None and (name == "studies" or rows.has_series):
        few = len(uids) <= NUMBERED
    else:
        (studies,) = db.execute("SELECT count(*) FROM base.studies").fetchall()[0]
        few, rows = len(uids) <= max(FEW, studies // SCANNED_FOR_ONE), None
    if few:
        for start in range(0, len(uids), FEW):
            condition, values = among("StudyInstanceUID", uids[start : start + FEW])
            db.execute(f"{insert} WHERE {condition}", values)
        return
    if rows is not None:
        found = rows.studies(uids)
        numbers = found if name == "studies" else rows.series_of(found)
        db.execute(f"{insert} WHERE rowid IN (SELECT unnest(?::BIGINT[]))", [numbers.tolist()])
        return
    condition, values = among("StudyInstanceUID", uids)
    db.execute(f"CREATE TEMP TABLE taken AS SELECT rowid AS number FROM base.{name} WHERE {condition}", values)
    db.execute(f"{insert} WHERE rowid IN (SELECT number FROM taken)")
    db.execute("DROP TABLE taken")


def _roll_up_patients(db: duckdb.DuckDBPyConnection, keys: Sequence[str], selected: Selected) -> None:
    condition, values = among("patient_key", keys)
    db.execute(f"DELETE FROM {SCHEMA}.patients WHERE {condition}", values)
    theirs = list(source_columns("patients"))
    counted = ", ".join(f'count("{name}")' for name in theirs)
    counts = db.execute(f"SELECT {counted} FROM {SCHEMA}.studies WHERE {condition}", values).fetchall()[0]
    empty = {name for name, count in zip(theirs, counts, strict=True) if not count}
    absent = optional_columns("patients") & empty
    listed = ", ".join(f'"{name}"' for name in theirs)
    rolled = roll_up_sql("patients", f"(SELECT {listed} FROM {SCHEMA}.studies WHERE {condition})", absent=absent)
    filled = [name for name in TABLES["patients"].schema.names if name not in absent]
    _insert(db, "patients", f"({rolled})", filled, selected, values)


def _insert(
    db: duckdb.DuckDBPyConnection,
    name: str,
    source: str,
    filled: Sequence[str],
    selected: Selected,
    values: Sequence[Any] = (),
) -> None:
    """Add the rows of `source`, of which columns that are not `filled` are null: planning each costs half a
    millisecond."""
    columns = ", ".join(selected(column) for column in filled)
    db.execute(f"INSERT INTO {SCHEMA}.{name} BY NAME SELECT {columns} FROM {source}", list(values))
