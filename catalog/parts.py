"""Few instances out of the files that hold a study, read without planning: one row group, the columns in question.

A file of `instances` has a hundred columns or so (older ones have all), whose footer takes time to read: files that
were read last stay open, and so do columns of their row groups, as who asks for a series mostly asks for the next one
of that study.
For files of a local disk; where they are elsewhere, DuckDB reads them (see sphere.catalog.plan).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sphere.catalog.arrow import strings

FILES: Final = 24
"""Files that stay open: about 0.4 MB each, 3 MB where they have all the columns."""
COLUMNS: Final = 64 << 20
"""Bytes of columns that are kept; large ones (`dataset`) are not."""
LARGEST: Final = 4 << 20
STUDY: Final = "StudyInstanceUID"


@dataclass
class _File:
    """An open file. One thread reads at a time.

    `places` are those of the columns in some other file, often the same: to list them takes as long as to read a few.
    """

    parquet: pq.ParquetFile
    places: dict[str, int]
    lock: threading.Lock = field(default_factory=threading.Lock)
    listed: bool = False

    def place(self, name: str) -> int | None:
        """Where a column is; None where the file has none of that name."""
        place = self.places.get(name)
        if not self.listed and (place is None or place >= len(self.parquet.schema) or self._name(place) != name):
            self.places = {self._name(number): number for number in range(len(self.parquet.schema))}
            self.listed = True
            place = self.places.get(name)
        return place

    def _name(self, place: int) -> str:
        return str(self.parquet.schema.column(place).path).partition(".")[0]

    def groups(self, studies: Sequence[str]) -> list[int]:
        """The row groups that may hold one of the studies, as their statistics say."""
        metadata, place = self.parquet.metadata, self.place(STUDY) or 0
        found = []
        for number in range(metadata.num_row_groups):
            told = metadata.row_group(number).column(place).statistics
            if told is None or not told.has_min_max or any(told.min <= uid <= told.max for uid in studies):
                found.append(number)
        return found


class InstanceFiles:
    """The files of `instances` that were read last. Thread-safe: they are never written again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: OrderedDict[str, _File] = OrderedDict()
        self._columns: OrderedDict[tuple[str, int, str], pa.Array] = OrderedDict()
        self._places: dict[str, int] = {}
        self._size = 0

    def rows(
        self, paths: Sequence[str], studies: Sequence[str], narrowed: Mapping[str, Sequence[str]], names: Sequence[str]
    ) -> list[tuple[Any, ...]]:
        """The columns `names` of the instances of some studies, with one of the values of each column in `narrowed`.

        Raises OSError and pa.ArrowException where a file cannot be read.
        """
        found: list[tuple[Any, ...]] = []
        wanted = {STUDY: studies, **narrowed}
        for path in paths:
            file = self._opened(path)
            for group in file.groups(studies):
                chosen = self._chosen(path, file, group, wanted)
                if len(chosen):
                    columns = (self._values(path, file, group, name, chosen) for name in names)
                    found += zip(*columns, strict=True)
        return found

    def _chosen(self, path: str, file: _File, group: int, wanted: Mapping[str, Sequence[str]]) -> pa.Array:
        masks = []
        for name, texts in wanted.items():
            column = self._column(path, file, group, name)
            if column is None:
                return pa.nulls(0, pa.uint64())
            one = pc.equal(column, texts[0]) if len(texts) == 1 else pc.is_in(column, value_set=strings(texts))
            masks.append(one)
        mask = masks[0]
        for more in masks[1:]:
            mask = pc.and_(mask, more)
        return pc.indices_nonzero(mask)

    def _values(self, path: str, file: _File, group: int, name: str, chosen: pa.Array) -> list[Any]:
        column = self._column(path, file, group, name)
        if column is None:
            return [None] * len(chosen)
        return cast("list[Any]", column.take(chosen).to_pylist())

    def _column(self, path: str, file: _File, group: int, name: str) -> pa.Array | None:
        """A column of a row group; None where the file has none of that name."""
        key = path, group, name
        with self._lock:
            if key in self._columns:
                self._columns.move_to_end(key)
                return self._columns[key]
        with file.lock:
            place = file.place(name)
            if place is None:
                return None
            table = file.parquet.reader.read_row_group(group, column_indices=[place], use_threads=False)
        column = table.column(0).combine_chunks()
        if isinstance(column, pa.ChunkedArray):  # what pyarrow gives of a column without rows
            column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.nulls(0, column.type)
        if column.nbytes <= LARGEST:
            self._keep(key, column)
        return column

    def _keep(self, key: tuple[str, int, str], column: pa.Array) -> None:
        with self._lock:
            if key not in self._columns:
                self._columns[key] = column
                self._size += column.nbytes
            while self._size > COLUMNS:
                self._size -= self._columns.popitem(last=False)[1].nbytes

    def _opened(self, path: str) -> _File:
        with self._lock:
            if path in self._files:
                self._files.move_to_end(path)
                return self._files[path]
        file = _File(pq.ParquetFile(path, memory_map=True), self._places)
        if file.place(STUDY) is None:
            raise pa.ArrowInvalid(f"{path} has no {STUDY}")
        with self._lock:
            self._places = file.places
            self._files[path] = file
            while len(self._files) > FILES:
                self._files.popitem(last=False)
        return file
