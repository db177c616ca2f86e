"""Roll-ups of rows that are in hand: each task rolls up the studies that it alone has, before it lets go of their rows.

Of a study whose instances are spread over several tasks, its rows themselves travel on, only the columns that roll-ups
need and that say something.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields

import pyarrow as pa
import pyarrow.compute as pc

from sphere.catalog.rollup import description, optional_columns, source_columns
from sphere.catalog.schema import TABLES, patient_key
from sphere.jobs.contradictions import said
from sphere.jobs.grouping import grouped, grown
from sphere.jobs.lookup import empty, shaped

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
    """What `compute` gives, without columns that are null in every row."""
    schema = TABLES[name].schema
    if not len(rows):
        return empty(schema)
    found = grouped(rows, description(name))
    if name == "studies":
        found = found.append_column("patient_key", pa.array(_patient_keys(found), pa.string()))
    there = set(found.column_names)
    return shaped(found, pa.schema([field for field in schema if field.name in there]))


def _patient_keys(studies: pa.Table) -> list[str]:
    there = set(studies.column_names)
    ids, issuers, uids = (
        studies[name].to_pylist() if name in there else [None] * len(studies)
        for name in ("PatientID", "IssuerOfPatientID", "StudyInstanceUID")
    )
    return [patient_key(*one) for one in zip(ids, issuers, uids, strict=True)]


def grow(name: str, before: pa.Table, more: pa.Table) -> pa.Table:
    """The rows of the roll-up `name` for what it had `before`, all of which came before what the rows `more` are of."""
    rows = pa.concat_tables([before, more])
    if len(rows):
        rows = grown(rows, description(name), order=("first_received_at",))
    return shaped(rows, TABLES[name].schema)


def packed(rows: pa.Table | pa.RecordBatch, *, above: int = _PACKED) -> bytes:
    """As an Arrow stream, compressed `above` so many bytes: few rows take a millisecond more each way."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd" if rows.nbytes > above else None)
    with pa.ipc.new_stream(sink, rows.schema, options=options) as writer:
        writer.write(rows)
    data: bytes = sink.getvalue().to_pybytes()
    return data
