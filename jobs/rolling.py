"""Roll-ups of rows that are in hand: each task rolls up the studies that it alone has, before it lets go of their rows.

Of a study whose instances are spread over several tasks, its rows themselves travel on, only the columns that roll-ups
need and that say something. The SQL is that of every other roll-up.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from sphere.catalog.rollup import description, grown_sql, optional_columns, roll_up_sql, source_columns
from sphere.catalog.schema import TABLES
from sphere.jobs.contradictions import said
from sphere.jobs.lookup import shaped

# DuckDB's advice for many rows. A relation of `sql` is bound twice, which here costs more than a copy of its few rows.
warnings.filterwarnings("ignore", message="Arrow output on a DB-API result", category=UserWarning)

COLUMNS = tuple(source_columns("series") | source_columns("studies"))
"""Columns of `instances` that its roll-ups need."""
_OPTIONAL = optional_columns("series", "studies")
"""Of these, the columns that may be left out where they are null in every row."""
NEEDED = frozenset(COLUMNS) - _OPTIONAL
"""And those that may not."""
_PACKED = 1 << 20  # bytes of a table above which it is compressed on its way


@dataclass(frozen=True, slots=True)
class Rolled:
    """Rows of `series` and `studies`, and rows of `instances` (some of COLUMNS) that are yet to be rolled up.

    `said` has what any of the instances says that could contradict another. What a task gives lacks columns that are
    null in all its rows; `join` gives the whole tables.
    """

    series: pa.Table
    studies: pa.Table
    rows: pa.Table
    said: pa.Table

    def pack(self) -> dict[str, bytes]:
        """Each table as an Arrow stream, by its name."""
        return {field.name: packed(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def unpack(cls, **packed: bytes) -> Rolled:
        """What `pack` packed."""
        return cls(**{name: pa.ipc.open_stream(data).read_all() for name, data in packed.items()})


ROLLED = tuple(field.name for field in fields(Rolled))
"""Names of its tables."""


def roll_up(rows: pa.Table, *, split: Collection[str] = ()) -> Rolled:
    """Roll up `rows` of `instances` (at least COLUMNS where they say something) but for the studies of `split`."""
    present = [name for name in rows.column_names if name not in _OPTIONAL or rows[name].null_count < len(rows)]
    rows = rows.select(present)
    is_split = pc.is_in(rows["StudyInstanceUID"], pa.array(split, pa.string()))
    whole = rows.filter(pc.invert(is_split)) if split else rows
    return Rolled(_narrow("series", whole), _narrow("studies", whole), rows.filter(is_split), said(rows))


def join(pieces: Sequence[Rolled]) -> tuple[Rolled, set[str]]:
    """All the pieces as one, split studies rolled up, and the studies that stand in it more than once.

    Those are studies whose headers say another StudyInstanceUID than the journals, of which no task knew that it was
    not alone.
    """
    rows = _concat(piece.rows for piece in pieces)
    parts = [*pieces, roll_up(rows)] if len(rows) else pieces
    series, studies = (
        shaped(_concat(getattr(part, name) for part in parts), TABLES[name].schema) for name in ("series", "studies")
    )
    heard = said(_concat(part.said for part in parts))
    counts = studies.group_by("StudyInstanceUID").aggregate([([], "count_all")])
    twice = set(counts.filter(pc.greater(counts["count_all"], 1))["StudyInstanceUID"].to_pylist())
    return Rolled(series, studies, rows.slice(0, 0), heard), twice


def _concat(tables: Iterable[pa.Table]) -> pa.Table:
    """All rows, with null where one of the tables lacks a column."""
    return pa.concat_tables(tables, promote_options="default")


def compute(name: str, rows: pa.Table) -> pa.Table:
    """The rows of the roll-up `name` from those of its source (of COLUMNS, for `series` and `studies`)."""
    return shaped(_narrow(name, rows), TABLES[name].schema)


def _narrow(name: str, rows: pa.Table) -> pa.Table:
    """What `compute` gives, without attributes that the rows do not have."""
    schema = TABLES[name].schema
    if not len(rows):
        return schema.empty_table()
    absent = () if name == "patients" else _OPTIONAL.difference(rows.column_names)
    ordered = rows.sort_by([(column, "ascending") for column in description(name).order])
    found = _placed(ordered, roll_up_sql(name, "source", absent=absent, narrow=True))
    there = set(found.column_names)
    return shaped(found, pa.schema([field for field in schema if field.name in there]))


def grow(name: str, before: pa.Table, more: pa.Table) -> pa.Table:
    """The rows of the roll-up `name` for what it had `before`, all of which came before what the rows `more` are of."""
    rows = pa.concat_tables([before, more]).sort_by("first_received_at")
    found = _placed(rows, grown_sql(name, "source")) if len(rows) else rows
    return shaped(found, TABLES[name].schema)


def _placed(ordered: pa.Table, statement: str) -> pa.Table:
    """What a statement gives of "source", which has a column of its rows' places."""
    with _database().cursor() as db:
        db.execute("PRAGMA disable_optimizer")  # it takes longer than one scan and one aggregate do
        db.register("source", ordered.append_column("place", pa.array(range(len(ordered)))))
        found = db.execute(statement).to_arrow_table()
        assert found is not None  # a SELECT has a result
    return found


@functools.cache
def _database() -> duckdb.DuckDBPyConnection:
    """One for all tasks of a worker process: opening one costs more than a roll-up."""
    db = duckdb.connect(config={"threads": 1})
    db.execute("SET GLOBAL TimeZone = 'UTC'")
    return db


def packed(rows: pa.Table | pa.RecordBatch, *, above: int = _PACKED) -> bytes:
    """As an Arrow stream, compressed `above` so many bytes: few rows take a millisecond more each way."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd" if rows.nbytes > above else None)
    with pa.ipc.new_stream(sink, rows.schema, options=options) as writer:
        writer.write(rows)
    data: bytes = sink.getvalue().to_pybytes()
    return data
