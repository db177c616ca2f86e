"""The rows of an index's base as columns that are mapped into memory, and sorted keys to find some of them by.

A lookup in DuckDB costs a millisecond, most of it planning; here it is a binary search and a few reads. The files are
derived from the base, lie beside it, and go with it: where they are missing or damaged (sphere.catalog.rows_note),
queries are put to DuckDB until they are made anew. Rows are in the order of the base's tables, which is that of
answers. Nothing here decides what matches: what is found by a key are candidates (see sphere.catalog.direct).
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from bisect import bisect_left
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, cast

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sphere.catalog.arrow import integers, numbers
from sphere.catalog.rows_note import NotedFiles, write_note
from sphere.catalog.schema import TABLES, level_of

log = logging.getLogger(__name__)

SUFFIX: Final = ".rows"
SHIFT = 20
"""Rows of one record batch, as a power of two: its texts stay below the 2 GiB that Arrow's offsets reach."""
KEYS: Final = (("patients", "PatientID"), ("studies", "StudyInstanceUID"), ("studies", "PatientID"),
               ("studies", "AccessionNumber"))  # fmt: skip
SERIES_KEPT: Final = (
    "SeriesInstanceUID", "Modality", "SeriesNumber", "SeriesDescription", "SeriesDate", "SeriesTime",
    "BodyPartExamined", "ProtocolName", "Laterality", "PatientPosition", "NumberOfSeriesRelatedInstances",
    "PerformingPhysicianName", "OperatorsName", "PerformedProcedureStepStartDate", "PerformedProcedureStepStartTime",
    "PerformedProcedureStepID", "PerformedProcedureStepDescription",
)  # fmt: skip
"""Columns of `series`, the longest table, that are kept; for others DuckDB is asked."""
FEW: Final = 8
"""Rows up to which values are taken one by one."""
_DAY_ZERO: Final = date(1970, 1, 1).toordinal()
_LAST: Final = "\U0010ffff"

Rows = npt.NDArray[np.int64]
"""Numbers of rows, ascending."""


def kept(table: str) -> tuple[str, ...]:
    """The columns of a table that can be had from here."""
    if table == "series":
        return SERIES_KEPT
    return tuple(name for name in TABLES[table].schema.names if level_of(name) is not None or name == "patient_key")


def folder_of(base: Path) -> Path:
    """Where the rows of a base are."""
    return base.with_suffix(SUFFIX)


def are_beside(base: Path) -> bool:
    """Whether the rows beside a base are what was written, by every byte."""
    return open_beside(base) is not None


def open_beside(base: Path) -> RowStore | None:
    """The rows beside a base; None, and a line in the log, where they cannot be relied on."""
    try:
        return RowStore(base)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        log.warning("index %s has no rows beside it, lookups are slower: %s", base.name, type(error).__name__)
        return None


def build(db: duckdb.DuckDBPyConnection, folder: Path, *, base: str = "") -> None:
    """Write the rows of the base that `db` holds, or has attached under the name `base`; an earlier attempt is
    replaced. Raises duckdb.Error and OSError."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    parts: list[Callable[[duckdb.DuckDBPyConnection], None]] = [  # the large ones of columns not beside each other
        partial(_write_columns, table="series", folder=folder),
        *(partial(_write_key, table=table, column=column, folder=folder) for table, column in KEYS),
        *(partial(_write_columns, table=table, folder=folder) for table in ("studies", "patients")),
        *(partial(write, folder=folder) for write in (_write_series_of, _write_names, _write_files_of, _write_dates)),
    ]
    with ThreadPoolExecutor(2, thread_name_prefix="index-rows") as pool:
        for part in [pool.submit(_with_cursor, db, part, base) for part in parts]:
            part.result()
    write_note(folder)


def _with_cursor(db: duckdb.DuckDBPyConnection, part: Callable[[duckdb.DuckDBPyConnection], None], base: str) -> None:
    with db.cursor() as cursor:
        if base:
            cursor.execute(f"USE {base}")
        part(cursor)


def _write_columns(db: duckdb.DuckDBPyConnection, table: str, folder: Path) -> None:
    """The columns that have a value; of the others only the names."""
    names = kept(table)
    listed = ", ".join(f'count("{name}")' for name in names)
    counts = db.execute(f"SELECT {listed} FROM {table}").fetchall()[0]
    filled = [name for name, count in zip(names, counts, strict=True) if count] or [names[0]]
    reader = db.sql(f"SELECT {', '.join(_quoted(filled))} FROM {table}").to_arrow_reader(1 << SHIFT)
    with pa.OSFile(str(folder / f"{table}.arrow"), "wb") as file, pa.ipc.new_file(file, reader.schema) as writer:
        waiting: list[pa.RecordBatch] = []
        for batch in reader:
            waiting.append(batch)
            if sum(map(len, waiting)) >= 1 << SHIFT:
                waiting = _flush(writer, waiting, 1 << SHIFT)
        _flush(writer, waiting, 1)


def _flush(writer: pa.ipc.RecordBatchFileWriter, batches: list[pa.RecordBatch], least: int) -> list[pa.RecordBatch]:
    """Write batches of 2**SHIFT rows, the last one of at least `least`; what is left."""
    if not batches:
        return []
    table, at = pa.Table.from_batches(batches), 0
    while len(table) - at >= least and at < len(table):
        writer.write_table(table.slice(at, 1 << SHIFT).combine_chunks(), 1 << SHIFT)
        at += 1 << SHIFT
    return [batch for batch in table.slice(at).to_batches() if len(batch)]


def _quoted(names: Sequence[str]) -> list[str]:
    return [f'"{name}"' for name in names]


def _write_key(db: duckdb.DuckDBPyConnection, table: str, column: str, folder: Path) -> None:
    sql = f'SELECT md5_number_lower("{column}") AS hash, "{column}" IS NOT NULL AS there FROM {table}'
    found = db.execute(sql).fetchnumpy()
    there = np.flatnonzero(np.asarray(found["there"]))
    hashes = np.ma.getdata(found["hash"]).astype(np.uint64)[there]
    order = np.argsort(hashes, kind="stable")
    _save(folder, f"{table}.{column}.hashes", hashes[order])
    _save(folder, f"{table}.{column}.rows", there[order].astype(np.uint32))


def _write_series_of(db: duckdb.DuckDBPyConnection, folder: Path) -> None:
    """Where the series of each study begin, and the study of each series; a series without its study is not there."""
    sql = "SELECT t.rowid AS row FROM series s LEFT JOIN studies t USING (StudyInstanceUID) ORDER BY s.rowid"
    found = db.execute(sql).fetchnumpy()["row"]
    study = np.ma.filled(found, -1).astype(np.int32)
    (studies,) = db.execute("SELECT count(*) FROM studies").fetchall()[0]
    known = study[study >= 0]
    if len(known) != len(study) or np.any(np.diff(known) < 0):
        known, study = np.empty(0, np.int32), np.empty(0, np.int32)  # tables that do not fit together: ask DuckDB
    _save(folder, "series.study", study)
    _save(folder, "studies.series", np.searchsorted(known, np.arange(studies + 1)).astype(np.uint32))


def _write_files_of(db: duckdb.DuckDBPyConnection, folder: Path) -> None:
    """The numbers of the files that hold instances of each study."""
    sql = "SELECT t.rowid AS row, f.id FROM study_files f JOIN studies t USING (StudyInstanceUID) ORDER BY ALL"
    found = db.execute(sql).fetchnumpy()
    (studies,) = db.execute("SELECT count(*) FROM studies").fetchall()[0]
    _save(folder, "studies.files", np.searchsorted(np.asarray(found["row"]), np.arange(studies + 1)).astype(np.uint32))
    _save(folder, "files", np.asarray(found["id"]).astype(np.int32))


def _write_dates(db: duckdb.DuckDBPyConnection, folder: Path) -> None:
    day = "StudyDate - DATE '1970-01-01' AS day"
    sql = f"SELECT {day}, rowid AS row FROM studies WHERE StudyDate IS NOT NULL ORDER BY ALL"
    found = db.execute(sql).fetchnumpy()
    _save(folder, "days", np.asarray(found["day"]).astype(np.int32))
    _save(folder, "days.rows", np.asarray(found["row"]).astype(np.uint32))


def _write_names(db: duckdb.DuckDBPyConnection, folder: Path) -> None:
    """Every group of every name, normalised and sorted, each once with its rows."""
    sql = (
        "SELECT DISTINCT unnest(string_split(\"PatientName$name\", '=')) AS name, rowid AS row FROM studies "
        'WHERE "PatientName$name" IS NOT NULL ORDER BY ALL'
    )
    table = db.sql(sql).to_arrow_table().combine_chunks()
    names = table.column("name").combine_chunks()
    encoded = names.dictionary_encode() if len(names) else pa.nulls(0, pa.string()).dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    first = np.searchsorted(numbers(encoded.indices), np.arange(len(encoded.dictionary) + 1))
    _save(folder, "names.first", first.astype(np.uint32))
    _save(folder, "names.rows", numbers(table.column("row")).astype(np.uint32))
    distinct = pa.table({"name": encoded.dictionary})
    with pa.OSFile(str(folder / "names.arrow"), "wb") as file, pa.ipc.new_file(file, distinct.schema) as writer:
        writer.write_table(distinct, 1 << SHIFT)


def _save(folder: Path, name: str, values: npt.NDArray[Any]) -> None:
    np.save(folder / f"{name}.npy", values)


def _cell(array: pa.Array) -> Callable[[int], Any]:
    """What gives one value of a column; of most, from the mapped buffers: `as_py` takes four times as long."""
    form: Literal["", "i", "q"] = "i" if pa.types.is_date32(array.type) or pa.types.is_int32(array.type) else ""
    form = "q" if pa.types.is_int64(array.type) else form
    if array.offset or not (form or pa.types.is_string(array.type)):
        return lambda at: array[at].as_py()
    valid, *buffers = array.buffers()
    bits = memoryview(valid) if valid is not None and array.null_count else None
    if form:
        numbers = memoryview(buffers[0]).cast("B").cast(form)
        number = (lambda at: _day(numbers[at])) if pa.types.is_date32(array.type) else numbers.__getitem__
        return number if bits is None else lambda at: number(at) if bits[at >> 3] >> (at & 7) & 1 else None
    ends, texts = memoryview(buffers[0]).cast("B").cast("i"), memoryview(buffers[1] or b"")

    def text(at: int) -> str | None:
        if bits is not None and not bits[at >> 3] >> (at & 7) & 1:
            return None
        return str(texts[ends[at] : ends[at + 1]], "utf-8")

    return text


def _day(number: int) -> date:
    return date.fromordinal(_DAY_ZERO + number)


class _Columns:
    """The columns of one table."""

    def __init__(self, path: Path) -> None:
        self._table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        self._chunks = {name: self._table.column(name).chunks for name in self._table.column_names}
        self._cells = {name: [_cell(chunk) for chunk in chunks] for name, chunks in self._chunks.items()}
        self._dates = {field.name for field in self._table.schema if pa.types.is_date32(field.type)}
        self._shift = SHIFT

    def __len__(self) -> int:
        return len(self._table)

    def values(self, name: str, rows: Rows) -> list[Any]:
        """The values of a column in some rows."""
        chunks = self._chunks.get(name)
        if chunks is None:
            return [None] * len(rows)
        shift, mask = self._shift, (1 << self._shift) - 1
        if len(rows) <= FEW:
            cells = self._cells[name]
            return [cells[row >> shift](row & mask) for row in rows.tolist()]
        found: list[Any] = []
        ends = rows.searchsorted(np.arange(1, len(chunks) + 1) << shift)
        for chunk, first, last in zip(chunks, (0, *ends[:-1]), ends, strict=True):
            if first < last:  # of a column as a whole, Arrow would copy all chunks first
                found += self._listed(name, chunk.take(integers(rows[first:last] & mask)))
        return found

    def _listed(self, name: str, taken: pa.Array) -> list[Any]:
        if name in self._dates:  # ten times as fast as their own to_pylist
            days = taken.cast(pa.int32()).to_pylist()
            return [None if day is None else date.fromordinal(_DAY_ZERO + day) for day in days]
        return cast("list[Any]", taken.to_pylist())


@dataclass(frozen=True)
class _Key:
    """Sorted hashes of a column's values, and the row of each."""

    hashes: memoryview
    rows: memoryview

    def find(self, text: str) -> list[int]:
        """The rows that may have a value (two values may have one hash)."""
        digest = hashlib.md5(text.encode(), usedforsecurity=False).digest()
        wanted = int.from_bytes(digest[8:], "little")
        at, found = bisect_left(self.hashes, wanted), []
        while at < len(self.hashes) and self.hashes[at] == wanted:
            found.append(self.rows[at])
            at += 1
        return found


class RowStore:
    """The rows of one base, open for reading; safe to share between threads."""

    def __init__(self, base: Path) -> None:
        """Reads every byte once. Raises OSError, ValueError and pa.ArrowException where they are not there, or not
        what was written."""
        folder = folder_of(base)
        self._folder, self._files_noted = folder, NotedFiles(folder)
        self.tables = {
            name: _Columns(self._files_noted.path(folder / f"{name}.arrow"))
            for name in ("patients", "studies", "series")
        }
        self._keys = {
            key: _Key(*(self._load(f"{'.'.join(key)}.{what}").data for what in ("hashes", "rows"))) for key in KEYS
        }
        self._series_study = self._load("series.study")
        self._series_first = self._load("studies.series")
        self._files_first, self._files = self._load("studies.files"), self._load("files")
        self._days, self._days_rows = self._load("days"), self._load("days.rows")
        names = pa.memory_map(str(self._files_noted.path(folder / "names.arrow")))
        self._names = pa.ipc.open_file(names).read_all().column("name")
        self._names_first, self._names_rows = self._load("names.first"), self._load("names.rows")
        self.has_series = len(self._series_study) == len(self.tables["series"])

    def is_of(self, base: Path) -> bool:
        """Whether these are the rows that now are beside `base`."""
        return folder_of(base) == self._folder and not self.have_changed()

    def have_changed(self) -> bool:
        """Whether somebody wrote to the files or took them away since: what is mapped is not to be asked then."""
        return self._files_noted.have_changed()

    def are_whole(self) -> bool:
        """Whether the files still are what was written, by every byte."""
        return self._files_noted.are_whole()

    def _load(self, name: str) -> npt.NDArray[Any]:
        path = self._files_noted.path(self._folder / f"{name}.npy")
        return cast("npt.NDArray[Any]", np.load(path, mmap_mode="r"))

    def by_key(self, table: str, column: str, texts: Sequence[str]) -> Rows:
        """The rows that may have one of the texts in a column of KEYS."""
        key = self._keys[table, column]
        if len(texts) == 1:
            return np.array(key.find(texts[0]), np.int64)  # ascending: sorted by the hash, and then as they come
        return np.array(sorted({row for text in texts for row in key.find(text)}), np.int64)

    def studies(self, uids: Sequence[str]) -> Rows:
        """The studies that have one of some StudyInstanceUIDs."""
        found, wanted = self.by_key("studies", "StudyInstanceUID", uids), set(uids)
        known = self.tables["studies"].values("StudyInstanceUID", found)
        return found[[uid in wanted for uid in known]] if len(found) else found

    def by_days(self, low: date | None, high: date | None, most: int) -> Rows | None:
        """The studies of a range of dates; None where they are more than `most`."""
        first = 0 if low is None else int(self._days.searchsorted(low.toordinal() - _DAY_ZERO, "left"))
        last = len(self._days) if high is None else int(self._days.searchsorted(high.toordinal() - _DAY_ZERO, "right"))
        return np.sort(self._days_rows[first:last]).astype(np.int64) if last - first <= most else None

    def by_name(self, prefix: str, most: int) -> Rows | None:
        """The studies of patients with a group of their name, normalised, that begins so; None where they are more
        than `most`."""
        names = _Texts(self._names)
        first, last = bisect_left(names, prefix), bisect_left(names, prefix + _LAST)
        rows = self._names_rows[int(self._names_first[first]) : int(self._names_first[last])]
        return np.unique(rows).astype(np.int64) if len(rows) <= most else None

    def studies_of(self, patients: Rows) -> Rows:
        """The studies of some patients that have a PatientID."""
        ids, keys = (self.tables["patients"].values(name, patients) for name in ("PatientID", "patient_key"))
        found, wanted = self.by_key("studies", "PatientID", ids), set(keys)
        known = self.tables["studies"].values("patient_key", found)
        return found[[key in wanted for key in known]] if len(found) else found

    def series_of(self, studies: Rows) -> Rows:
        """The series of some studies."""
        spans = [np.arange(self._series_first[row], self._series_first[row + 1], dtype=np.int64) for row in studies]
        return np.concatenate(spans) if spans else np.empty(0, np.int64)

    def study_of(self, series: Rows) -> Rows:
        """The study of each of some series."""
        return self._series_study[series].astype(np.int64)

    def files_of(self, studies: Rows) -> set[int]:
        """The numbers of the files that hold instances of any of the studies."""
        found: set[int] = set()
        for row in studies.tolist():
            found.update(self._files[self._files_first[row] : self._files_first[row + 1]].tolist())
        return found


class _Texts(Sequence[str]):
    """A sorted column of texts, to be searched."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._chunks = column.chunks
        self._length = len(column)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, at: Any) -> Any:
        return self._chunks[at >> SHIFT][at & (1 << SHIFT) - 1].as_py()
