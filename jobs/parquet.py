"""Rows to one Parquet file of a Delta table, with the statistics that Delta keeps of its first columns."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from sphere.catalog.schema import Table
from sphere.ingest.storage.base import Storage
from sphere.jobs.lookup import shaped

INDEXED = 32
"""Columns with statistics (delta.dataSkippingNumIndexedCols)."""
ROW_GROUP = 8192
"""Rows of a row group at most: what a reader takes into memory at once."""
_DISTINCT = frozenset(("dataset", "sha256", "SOPInstanceUID"))  # columns whose values differ: a dictionary only costs
_DISTINCT_OF = {
    "patients": (
        "patient_key", "PatientID", "PatientName", "PatientBirthDate", "size_bytes", "first_received_at",
        "last_received_at",
    ),
}  # fmt: skip
_QUICK = frozenset(("patients",))
"""Tables whose files most batches write anew: what compresses best takes half of that time, for the least of all
tables."""
_TEXT = 64  # characters of a text bound: a UID whole (PS3.5 9.1)


@dataclass(frozen=True, slots=True)
class NewFile:
    """A Parquet file below a table's folder, ready to become part of the table; `size` in bytes, `stats` as JSON."""

    path: str
    size: int
    modified_ms: int
    stats: str


class FileWriter:
    """One Parquet file, built in memory and put on the storage as a whole when it is finished.

    Columns of hundreds that are null in every row cost time and bytes in every file: those of a sparse table are left
    out.
    """

    def __init__(self, table: Table) -> None:
        self._schema = table.schema
        self._names: list[str] = table.schema.names
        always = self._names[:INDEXED] if table.name == "instances" else table.key
        self._kept = frozenset(always if table.sparse else self._names)
        self._quick = table.name in _QUICK
        self._distinct = _DISTINCT | frozenset(_DISTINCT_OF.get(table.name, ()))
        self._pieces: list[pa.Table] = []
        self.rows = 0

    def add(self, batch: pa.RecordBatch) -> None:
        """Append rows as one row group; columns that the table does not have are left out."""
        self._pieces.append(pa.Table.from_batches([batch]))
        self.rows += len(batch)

    def finish(self, storage: Storage, folder: str) -> NewFile:
        """Write the file, of one batch at least, under a new name below `folder`; the path given is relative to it."""
        file, data = self.encoded()
        storage.write(f"{folder}/{file.path}", data)
        return file

    def encoded(self) -> tuple[NewFile, bytes]:
        """The file, under a new name, that is yet to be written, and what it is going to hold."""
        schema, used = self._used()
        pieces = [shaped(piece, schema) for piece in self._pieces]
        sink = pa.BufferOutputStream()
        # Compressor and dictionary cost time for each column: only those that say something have them.
        with pq.ParquetWriter(
            sink,
            schema,
            use_dictionary=[name for name in used if name not in self._distinct],
            **self._compression(schema, used),
        ) as writer:
            for piece in pieces:
                writer.write_table(piece, row_group_size=len(piece))
        data = sink.getvalue().to_pybytes()
        there = set(schema.names)
        indexed = [name for name in self._names[:INDEXED] if name in there]
        stats = statistics(pa.concat_tables(pieces).select(indexed), writer.writer.metadata)
        path = f"part-{uuid.uuid4()}.{'lz4' if self._quick else 'zstd'}.parquet"
        return NewFile(path, len(data), int(time.time() * 1000), stats), data

    def _compression(self, schema: pa.Schema, used: Sequence[str]) -> dict[str, Any]:
        codec = dict.fromkeys(schema.names, "NONE")
        if self._quick:
            return {"compression": codec | {name: "lz4" for name in used if schema.field(name).type == pa.string()}}
        return {"compression": codec | dict.fromkeys(used, "zstd"), "compression_level": dict.fromkeys(used, 1)}

    def _used(self) -> tuple[pa.Schema, list[str]]:
        """The columns of the file, and those of them that say something, in the order of the schema."""
        said = {
            name
            for piece in self._pieces
            for name, column in zip(piece.column_names, piece.columns, strict=True)
            if column.null_count < len(column)
        }
        used = [name for name in self._names if name in said]
        return pa.schema([self._schema.field(name) for name in self._names if name in said or name in self._kept]), used


def statistics(rows: pa.Table, metadata: pq.FileMetaData) -> str:
    """Per-file statistics of the Delta protocol as JSON: number of rows, bounds and nulls of the columns of `rows`, of
    which the Parquet file is that has the `metadata`.

    Bounds may be wider than the values, never narrower: long texts are cut, times are rounded to milliseconds. None are
    given of lists, nor where Parquet has none.
    """
    nulls = {name: column.null_count for name, column in zip(rows.column_names, rows.columns, strict=True)}
    wanted = {name for name, count in nulls.items() if count < len(rows)}
    low: dict[str, Any] = {}
    high: dict[str, Any] = {}
    for at in range(metadata.num_columns):
        name = metadata.schema.column(at).path
        if name in wanted:
            found = _bounds([metadata.row_group(group).column(at) for group in range(metadata.num_row_groups)])
            low[name], high[name] = _bound(found[0], up=False), _bound(found[1], up=True)
    known = [name for name in low if low[name] is not None and high[name] is not None]
    return orjson.dumps(
        {
            "numRecords": len(rows),
            "minValues": {name: low[name] for name in known},
            "maxValues": {name: high[name] for name in known},
            "nullCount": nulls,
        }
    ).decode()


def _bounds(chunks: Iterable[pq.ColumnChunkMetaData]) -> tuple[Any, Any]:
    """The least and the greatest value of a column, None where there is no value or one of the chunks has no bounds."""
    found = []
    for chunk in chunks:
        one = chunk.statistics
        if one is None or not one.has_min_max:
            if one is None or not one.has_null_count or one.null_count < chunk.num_values:
                return None, None
        else:
            found.append((one.min, one.max))
    if not found:
        return None, None
    return min(low for low, _ in found), max(high for _, high in found)


def _bound(value: Any, *, up: bool) -> Any:
    """The JSON form of a bound, None where there is none."""
    if isinstance(value, str):
        return value[:_TEXT] + ("\U0010ffff" if up else "") if len(value) > _TEXT else value
    if isinstance(value, datetime):
        if up and value.microsecond % 1000:
            value += timedelta(milliseconds=1)
        return f"{value:%Y-%m-%dT%H:%M:%S}.{value.microsecond // 1000:03}Z"
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
