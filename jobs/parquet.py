"""Rows to one Parquet file of a Delta table, with the statistics that Delta keeps of its first columns."""

from __future__ import annotations

import io
import math
import time
import uuid
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc
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
        self._kept = frozenset(table.schema.names[:INDEXED] if table.sparse else table.schema.names)
        self._distinct = _DISTINCT | frozenset(_DISTINCT_OF.get(table.name, ()))
        self._pieces: list[pa.Table] = []
        self.rows = 0

    def add(self, batch: pa.RecordBatch) -> None:
        """Append rows as one row group; columns that the table does not have are left out."""
        self._pieces.append(pa.Table.from_batches([batch]))
        self.rows += len(batch)

    def finish(self, storage: Storage, folder: str) -> NewFile:
        """Write the file, of one batch at least, under a new name below `folder`; the path given is relative to it."""
        schema, used = self._used()
        sink = io.BytesIO()
        # Compressor and dictionary cost time for each column: only those that say something have them.
        with pq.ParquetWriter(
            sink,
            schema,
            compression=dict.fromkeys(schema.names, "NONE") | dict.fromkeys(used, "zstd"),
            compression_level=dict.fromkeys(used, 1),
            use_dictionary=[name for name in used if name not in self._distinct],
        ) as writer:
            for piece in self._pieces:
                writer.write_table(shaped(piece, schema), row_group_size=len(piece))
        name = f"part-{uuid.uuid4()}.zstd.parquet"
        data = sink.getvalue()
        storage.write(f"{folder}/{name}", data)
        indexed = pa.schema([self._schema.field(at) for at in range(min(INDEXED, len(self._schema)))])
        stats = statistics(pa.concat_tables([shaped(piece, indexed) for piece in self._pieces]))
        return NewFile(name, len(data), int(time.time() * 1000), stats)

    def _used(self) -> tuple[pa.Schema, list[str]]:
        """The columns of the file, and those of them that say something, in the order of the schema."""
        said = {
            name
            for piece in self._pieces
            for name, column in zip(piece.column_names, piece.columns, strict=True)
            if column.null_count < len(column)
        }
        used = [name for name in self._schema.names if name in said]
        return pa.schema([field for field in self._schema if field.name in said | self._kept]), used


def statistics(rows: pa.Table) -> str:
    """Per-file statistics of the Delta protocol as JSON: number of rows, bounds and nulls of the columns.

    Bounds may be wider than the values, never narrower: long texts are cut, times are rounded to milliseconds.
    """
    low: dict[str, Any] = {}
    high: dict[str, Any] = {}
    for name, column in zip(rows.column_names, rows.columns, strict=True):
        if pa.types.is_list(column.type) or column.null_count == len(column):
            continue
        bounds = pc.min_max(column)
        low[name] = _bound(bounds["min"].as_py(), up=False)
        high[name] = _bound(bounds["max"].as_py(), up=True)
    nulls = {name: column.null_count for name, column in zip(rows.column_names, rows.columns, strict=True)}
    known = [name for name in low if low[name] is not None and high[name] is not None]
    return orjson.dumps(
        {
            "numRecords": len(rows),
            "minValues": {name: low[name] for name in known},
            "maxValues": {name: high[name] for name in known},
            "nullCount": nulls,
        }
    ).decode()


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
