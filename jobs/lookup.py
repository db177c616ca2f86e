"""Rows of a table by the values of one column, from those of its files only that may hold them."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import DeltaTable

from sphere.catalog.schema import TABLES
from sphere.ingest.storage.base import Storage

TOGETHER = 4
"""Row groups of a file that are in memory at once."""


def files(table: DeltaTable) -> dict[str, int]:
    """The table's files, by their paths as its log has them, with their sizes in bytes."""
    actions = pa.table(table.get_add_actions())
    return dict(zip(actions["path"].to_pylist(), actions["size_bytes"].to_pylist(), strict=True))


def find(
    storage: Storage, name: str, paths: Iterable[str], columns: Sequence[str], *, key: str, values: pa.Array
) -> Iterator[pa.Table]:
    """`columns` of the rows of these files of the table `name` whose column `key` has one of `values`, in pieces of
    TOGETHER row groups at most; null where a file lacks a column."""
    schema = pa.schema([TABLES[name].schema.field(column) for column in columns])
    for path in paths if len(values) else ():
        with open_parquet(storage, f"{name}/{unquote(path)}") as file:
            yield from (shaped(piece, schema) for piece in _matching(file, columns, key, values))


def _matching(file: pq.ParquetFile, columns: Sequence[str], key: str, values: pa.Array) -> Iterator[pa.Table]:
    """Row groups that have one of the values, some at a time: Arrow reads their columns with several threads."""
    if key not in file.schema_arrow.names:
        return
    present = [key, *(column for column in said_columns(file, columns) if column != key)]
    there = pc.is_in(file.read(columns=[key])[key], value_set=values).to_numpy()
    ends = np.cumsum([file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)])
    groups = np.split(there, ends[:-1])
    held = [group for group, found in enumerate(groups) if found.any()]
    for start in range(0, len(held), TOGETHER):
        some = held[start : start + TOGETHER]
        rows = file.read_row_groups(some, columns=present)
        yield rows.filter(pa.array(np.concatenate([groups[group] for group in some])))


def said_columns(file: pq.ParquetFile, columns: Sequence[str]) -> list[str]:
    """Those of the columns in which a file may say something, by its statistics: the others are null in every row."""
    metadata, wanted = file.metadata, frozenset(columns)
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    names = [file.schema.column(at).path.partition(".")[0] for at in range(metadata.num_columns)]
    said = {
        name for at, name in enumerate(names) if name in wanted and any(_says(group.column(at)) for group in groups)
    }
    return [name for name in dict.fromkeys(columns) if name in said]


def _says(chunk: pq.ColumnChunkMetaData) -> bool:
    """Lists may: an empty one counts as null."""
    found = chunk.statistics
    nested = "." in chunk.path_in_schema
    return nested or found is None or not found.has_null_count or bool(found.null_count < chunk.num_values)


def empty(schema: pa.Schema) -> pa.Table:
    """No rows. (That of a schema itself asks the environment for each column.)"""
    return pa.Table.from_arrays([pa.nulls(0, field.type) for field in schema], schema=schema)


def shaped(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """The rows with the columns of `schema`, null where they lack one."""
    there = dict(zip(rows.column_names, rows.columns, strict=True))
    nulls: dict[pa.DataType, pa.Array] = {}
    columns = []
    for field in schema:
        column = there.get(field.name)
        if column is None:
            column = nulls.get(field.type)
            if column is None:
                column = nulls[field.type] = pa.nulls(len(rows), field.type)
        elif column.type != field.type:
            column = column.cast(field.type)
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=schema)


def open_parquet(storage: Storage, path: str) -> pq.ParquetFile:
    """A Parquet file of the storage, of which only what is asked for is read."""
    return pq.ParquetFile(pa.PythonFile(_Ranges(storage, path), mode="r"), pre_buffer=True)


class _Ranges(io.RawIOBase):
    """A file of the storage as Python's files are, read by ranges."""

    def __init__(self, storage: Storage, path: str) -> None:
        self._storage = storage
        self._path = path
        self._size = storage.size(path)
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        wanted = self._size - self._at if size is None or size < 0 else min(size, self._size - self._at)
        data = self._storage.read(self._path, self._at, wanted) if wanted > 0 else b""
        self._at += len(data)
        return data
