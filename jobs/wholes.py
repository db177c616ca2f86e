"""Files of a table that are read as a whole, several at once: to find rows in them that are about to be merged, and
then for the merge, which reads nothing again, and for the next one, which finds what it wrote."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sphere.catalog.schema import TABLES
from sphere.ingest.storage.base import Storage
from sphere.jobs.lookup import empty, said_columns, shaped

ABREAST = 2
"""Files that are worked on at once, by threads: Arrow's work is done without Python's lock."""
KEPT = 64 * 1024 * 1024
"""Bytes, as they are in memory, of files that are kept from finding rows to merging them, and to finding others: as
much as the rows of half a million patients."""

_GROWS = 5  # times, when it is read, of a file's size
_File = tuple[str, str]  # table, path
_Given = TypeVar("_Given")


class Wholes:
    """Files below `storage`; for several threads at once."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._workers, self._readers = ThreadPoolExecutor(ABREAST), ThreadPoolExecutor(ABREAST)
        self._coming: dict[_File, Future[pa.Table]] = {}
        self._kept: dict[_File, pa.Table] = {}
        self._sought: set[str] = set()  # tables in which rows are found
        self._room = KEPT
        self._lock = threading.Lock()

    def abreast(self, work: Callable[[str], _Given], paths: Iterable[str]) -> Iterator[_Given]:
        """What `work` gives of each path, in their order."""
        return self._workers.map(work, paths)

    def foresee(self, name: str, sizes: Mapping[str, int]) -> None:
        """Begin to read files, by their paths with their sizes in bytes, that `find` will soon be asked to look into,
        as many of them as there is room for."""
        room = self._room // _GROWS
        for path, size in sizes.items():
            if (name, path) not in self._kept and (name, path) not in self._coming:
                room -= size
                if room >= 0:
                    self._coming[name, path] = self._readers.submit(self._read, name, path)

    def find(self, name: str, paths: Sequence[str], *, values: pa.Array) -> pa.Table:
        """The rows of these files of the table `name` whose first key column has one of `values`; what the files say is
        kept for `take` while there is room."""
        schema, key = TABLES[name].schema, TABLES[name].key[0]
        self._sought.add(name)

        def matching(path: str) -> pa.Table:
            rows = self.take(name, path)
            self._keep(name, path, rows)
            return shaped(rows.filter(pc.is_in(rows[key], value_set=values)), schema)

        return pa.concat_tables([empty(schema), *self.abreast(matching, paths)])

    def take(self, name: str, path: str) -> pa.Table:
        """What a file says, with its key columns: columns that are null in every row are left out."""
        with self._lock:
            rows = self._kept.pop((name, path), None)
            self._room += 0 if rows is None else rows.get_total_buffer_size()
            coming = self._coming.pop((name, path), None)
        if coming is not None:
            rows = coming.result()
        return self._read(name, path) if rows is None else rows

    def wrote(self, name: str, path: str, rows: pa.Table) -> None:
        """What a new file says, to be kept as if `find` had read it, which often looks for others of its rows next."""
        if name in self._sought:
            self._keep(name, path, rows)

    def retain(self, name: str, paths: Collection[str]) -> None:
        """Of a table, keep nothing but what these files say, which are all that it has."""
        with self._lock:
            for where in [where for where in self._coming if where[0] == name and where[1] not in paths]:
                self._coming.pop(where).cancel()
            for where in [where for where in self._kept if where[0] == name and where[1] not in paths]:
                self._room += self._kept.pop(where).get_total_buffer_size()

    def _keep(self, name: str, path: str, rows: pa.Table) -> None:
        size = rows.get_total_buffer_size()
        with self._lock:
            if size <= self._room and (name, path) not in self._kept:
                self._kept[name, path] = rows
                self._room -= size

    def _read(self, name: str, path: str) -> pa.Table:
        table = TABLES[name]
        with pq.ParquetFile(pa.BufferReader(self._storage.read(f"{name}/{unquote(path)}"))) as file:
            said = dict.fromkeys((*table.key, *said_columns(file, table.schema.names)))
            return file.read(columns=list(said), use_threads=False)
