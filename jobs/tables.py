"""The catalog's tables as jobs write them: made on first use, committed on the very version that was read.

Commits are made by this process, so a killed job commits nothing afterwards, and a commit that finds a version it has
not seen fails instead of landing on top of it (see docs/decisions/0006-extraction.md).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Field, QueryBuilder, Transaction
from deltalake.exceptions import CommitFailedError
from deltalake.transaction import AddAction, RemoveAction

from sphere.catalog.schema import TABLES
from sphere.conf.errors import CatalogError, JobFailed
from sphere.conf.private import make_private
from sphere.conf.settings import Settings
from sphere.ingest.storage import open_storage
from sphere.jobs.commits import Overtaken, commit, delta_schema, is_plain
from sphere.jobs.joining import NOTHING, Joined, due, join
from sphere.jobs.keys import KeyFiles
from sphere.jobs.lookup import empty, find, open_parquet, shaped
from sphere.jobs.merge import Merge
from sphere.jobs.opened import At, OpenTables
from sphere.jobs.parquet import ROW_GROUP, FileWriter, NewFile
from sphere.jobs.wholes import Wholes

_KEEPS_LOG = "delta.enableExpiredLogCleanup"
"""By default every writer's hundredth commit removes the log of versions before the last 30 days: they could no longer
be asked, nor what came since be told."""
_PROPERTIES = {"delta.dataSkippingNumIndexedCols": "32", _KEEPS_LOG: "false"}
KEYS = {
    "instances": ("SOPInstanceUID", "StudyInstanceUID"),
    "series": ("StudyInstanceUID", "SeriesInstanceUID"),
    "studies": ("StudyInstanceUID", "patient_key"),
    "patients": ("patient_key",),
    "bundles": ("bundle",),
}
"""Columns of the tables that grow with the archive of which it is kept which files hold which value."""
SMALL = 256 * 1024
"""Bytes below which a file is joined with others by a merge."""
FILE_ROWS = 8 * ROW_GROUP
"""Rows of a file that a merge writes, at most."""
_FILE_ROWS = {"patients": 2 * ROW_GROUP}
"""Patients who come again are anywhere among all: each has the file written anew that holds it, as one row group."""
WRITERS = 8
"""Files that are on their way to the storage at once."""
JOINED = 8
"""Small files of a table, from which on a merge joins them."""


class Tables:
    """Delta tables below `catalog.root`, by their names in sphere.catalog.schema.TABLES.

    Threads may each merge into a table of their own.
    """

    def __init__(self, settings: Settings) -> None:
        become_hdfs_user(settings)
        self._root = settings.catalog_root
        self._state_dir = settings.archive.state_dir
        self._keys: dict[str, KeyFiles] = {}
        self._checked: set[str] = set()  # tables that have all the columns, and keep them: they are only ever added
        self._storage = open_storage(self._root, user=settings.storage.user)
        self._open = OpenTables(self._root, self._storage)
        self._wholes = Wholes(self._storage)
        self._writers, self._writing = ThreadPoolExecutor(WRITERS), threading.BoundedSemaphore(WRITERS)

    def url(self, name: str) -> str:
        """Where the table is."""
        return self._open.url(name)

    def spark_url(self, path: str) -> str:
        """A path below the catalog root as Hadoop's file systems take it: they decode nothing."""
        return unquote(f"{self._root}/{path}")

    def open(self, name: str) -> DeltaTable | None:
        """The table as of now, or None where nothing was ever written to it; raises CatalogError where it cannot be
        read.

        A table that was opened before is gone on with (sphere.jobs.opened).
        """
        return self._open.open(name)

    def latest(self, name: str) -> At | None:
        """What `current` gives, for who asks for a version and for rows by key, or commits: its log is not read after a
        commit of ours."""
        return self._open.latest(name) if name in self._checked else self.current(name)

    def look_again(self) -> None:
        """Before another job with the same tables: what other processes may have changed since is read again."""
        self._checked &= self._open.look_again()
        for keys in self._keys.values():
            keys.look_again()

    def current(self, name: str) -> DeltaTable | None:
        """The table as of now, given the columns and the property that it lacks, or None where nothing was ever
        written to it.

        Raises CatalogError where a type differs.
        """
        table = self.open(name)
        if table is not None and name not in self._checked:
            if _extended(table, name, TABLES[name].schema):
                self._open.made(name, table)
            self._checked.add(name)
        return table

    def ensure(self, name: str) -> DeltaTable:
        """What `current` gives, of a table that is made where there is none."""
        table = self.current(name)
        if table is None:
            if (parts := urlsplit(self.url(name))).scheme == "file":
                make_private(Path(unquote(parts.path)).parent)
            table = DeltaTable.create(self.url(name), TABLES[name].schema, configuration=_properties(name))
            self._open.made(name, table)
        return table

    def find(self, name: str, columns: Sequence[str], *, key: str, values: Iterable[str], at: At | None) -> pa.Table:
        """`columns` of the rows of a table whose column `key` has one of `values`; no row where there is no table."""
        nothing = empty(pa.schema([TABLES[name].schema.field(column) for column in columns]))
        return pa.concat_tables([nothing, *(self.pieces(name, columns, key=key, values=values, at=at) if at else ())])

    def find_to_merge(self, name: str, values: Iterable[str], *, at: At | None) -> pa.Table:
        """The rows of a table whose first key column has one of `values`, most of which are about to be merged anew:
        what is read for it is not read again by `merge`, and what that writes not by the next call."""
        wanted = pa.array(sorted(set(values)), pa.string())
        paths = self.holding(name, at, TABLES[name].key[0], wanted) if at else []
        self._wholes.retain(name, self._open.files(name, at) if at else ())
        return self._wholes.find(name, paths, values=wanted)

    def foresee(self, name: str, values: Iterable[str]) -> None:
        """Begin to read, beside what else is done, what `find_to_merge` is going to be asked for."""
        at = self.latest(name)
        if at is not None:
            sizes = self._open.files(name, at)
            wanted = pa.array(sorted(set(values)), pa.string())
            self._wholes.retain(name, sizes)
            self._wholes.foresee(
                name, {path: sizes[path] for path in self.holding(name, at, TABLES[name].key[0], wanted)}
            )

    def pieces(
        self, name: str, columns: Sequence[str], *, key: str, values: Iterable[str], at: At
    ) -> Iterator[pa.Table]:
        """What `find` finds, without ever holding all of it."""
        wanted = pa.array(sorted(set(values)), pa.string())
        return find(self._storage, name, self.holding(name, at, key, wanted), columns, key=key, values=wanted)

    def paths(self, name: str) -> Collection[str]:
        """The files of a table as of now; none where nothing was ever written to it."""
        at = self.latest(name)
        return self._open.files(name, at).keys() if at is not None else ()

    def read(self, name: str, path: str, columns: Sequence[str]) -> pa.Table:
        """These columns of all rows of one of its files."""
        with open_parquet(self._storage, f"{name}/{unquote(path)}") as file:
            there = [column for column in columns if column in file.schema_arrow.names]
            return shaped(file.read(columns=there), pa.schema([TABLES[name].schema.field(one) for one in columns]))

    def holding(self, name: str, table: At, key: str, values: pa.Array) -> list[str]:
        """The files that may hold one of the values of a key: all of them where no cache is kept of the key."""
        paths = list(self._open.files(name, table))
        columns = KEYS.get(name, ())
        if key not in columns:
            return paths
        if name not in self._keys:
            self._keys[name] = KeyFiles(self._state_dir / "keys" / name, columns)

        def load(path: str) -> pa.Table:
            return self.read(name, path, columns)

        return self._keys[name].holding(str(table.metadata().id), paths, key, values, load=load)

    def merge(
        self,
        name: str,
        rows: Sequence[Mapping[str, Any]] | pa.Table,
        *,
        gone: Sequence[Mapping[str, Any]] = (),
        onto: At | None = None,
        mark: tuple[str, int] | None = None,
    ) -> None:
        """Put `rows` in by the table's key, and take the rows of the keys `gone` out; without either do nothing.

        Files that hold one of the keys are written anew, and small ones are joined. The commit carries
        `mark`, an application's name and version, and fails where the table is no longer as in `onto`: raises JobFailed
        then.
        """
        self.put(self.prepare(name, rows, gone=gone, onto=onto), mark=mark)

    def prepare(
        self,
        name: str,
        rows: Sequence[Mapping[str, Any]] | pa.Table,
        *,
        gone: Sequence[Mapping[str, Any]] = (),
        onto: At | None = None,
    ) -> Prepared | None:
        """Write the files of a `merge`, which are part of the table only when they are `put` there.

        Tables may be prepared by several threads, each of them by one.
        """
        schema, key = TABLES[name].schema, list(TABLES[name].key)
        if not isinstance(rows, pa.Table):
            rows = pa.Table.from_pylist(list(rows), schema=schema)
        if not len(rows) and not gone:
            return None
        leaving = pa.Table.from_pylist(list(gone), schema=pa.schema([schema.field(column) for column in key]))
        if rows.schema != schema:
            rows = rows.select(schema.names).cast(schema)
        coming = Merge(rows, leaving, key)
        table = onto or self.latest(name)
        anew = self._placed(name, table, coming) if table else _Anew()
        result = pa.concat_tables([*anew.joined, coming.rest()], promote_options="default")
        rest = self._write(name, result.sort_by([(column, "ascending") for column in key]))
        anew.files += [one.result() for one in rest]
        return Prepared(name, table, anew)

    def put(self, prepared: Prepared | None, *, mark: tuple[str, int] | None = None) -> None:
        """The commit of a `merge`."""
        if prepared is None:
            return
        name, anew = prepared.name, prepared.anew
        self.append(name, anew.files, removed=anew.removed, onto=prepared.onto, mark=mark)
        if name in self._keys:
            self._keys[name].renamed(anew.renamed)

    def _write(self, name: str, rows: pa.Table) -> list[Future[NewFile]]:
        """New files with these rows, on their way to the storage."""
        written = []
        for start in range(0, len(rows), file_rows(name)):
            writer = FileWriter(TABLES[name])
            group = _FILE_ROWS.get(name, ROW_GROUP)
            for batch in rows.slice(start, file_rows(name)).combine_chunks().to_batches(max_chunksize=group):
                writer.add(batch)
            written.append(self._written(name, *writer.encoded()))
        return written

    def _written(self, name: str, file: NewFile, data: bytes) -> Future[NewFile]:
        """Write a file beside others: who makes the next one does not wait for the disk."""

        def write() -> NewFile:
            self._storage.write(f"{name}/{file.path}", data)
            return file

        self._writing.acquire()
        coming = self._writers.submit(write)
        coming.add_done_callback(lambda _: self._writing.release())
        return coming

    def _placed(self, name: str, table: At, coming: Merge) -> _Anew:
        """Files that hold one of the keys are written anew with the rows that come in their places, but small ones are
        joined, and so are all small ones once there are many."""
        sizes = self._open.files(name, table)
        holding = set(self.holding(name, table, TABLES[name].key[0], coming.keys))
        small = {path for path, size in sizes.items() if size < SMALL}
        joined = small if len(small) >= JOINED else small & holding
        anew = _Anew()
        for path in sorted(joined):
            with open_parquet(self._storage, f"{name}/{unquote(path)}") as file:
                stays = coming.others(file.read(columns=list(TABLES[name].key)))
                if stays.false_count or len(small) >= JOINED:
                    anew.joined.append(shaped(file.read(), TABLES[name].schema).filter(stays))
                    anew.removed[path] = sizes[path]

        def place(path: str) -> tuple[str, pa.Table, list[Future[NewFile]] | None, bool]:
            before = self._wholes.take(name, path)
            rows, same = coming.placed(before, KEYS.get(name, ()))
            return (path, before, None, same) if rows is None else (path, rows, self._write(name, rows), same)

        for path, rows, written, same in self._wholes.abreast(place, sorted(holding - joined)):
            if written is None:
                self._wholes.wrote(name, path, rows)
                continue
            anew.files += [one.result() for one in written]
            anew.removed[path] = sizes[path]
            if len(written) == 1:
                self._wholes.wrote(name, anew.files[-1].path, rows)
                if same:
                    anew.renamed[path] = anew.files[-1].path
        return anew

    def append(
        self,
        name: str,
        files: Sequence[NewFile],
        *,
        removed: Mapping[str, int] | None = None,
        joined: Joined = NOTHING,
        onto: At | None,
        mark: tuple[str, int] | None = None,
    ) -> None:
        """Make `files` part of the table, those at the paths `removed` (with their sizes) no longer, in one commit,
        which carries `mark` as that of `merge` does, and makes the table where `onto` is None. What `join_small` gave
        for `onto` is part of it.

        Raises JobFailed where the table is no longer as in `onto`.
        """
        removed = removed or {}
        version, said = onto.version() + 1 if onto is not None else 0, None
        try:
            if onto is None:
                commit(self._storage, name, 0, files, removed, mark=mark, properties=_properties(name))
                self._checked.add(name)
            elif is_plain(onto, removed):
                said = commit(self._storage, name, version, files, removed, joined=joined, mark=mark)
            else:
                _commit(self._whole(name, onto), name, files, removed, mark)
        except (Overtaken, CommitFailedError) as error:
            raise JobFailed(f"table {name} was changed by another process meanwhile; run the job again") from error
        if onto is not None:
            came, gone = [*files, *joined.files], {**removed, **joined.removed}
            self._open.committed(name, onto, version, came, gone, said=said)

    def join_small(self, onto: At | None) -> Joined:
        """Small files of `instances` as it is in `onto`, joined where that is due and the next commit can say so."""
        sizes = self._open.files("instances", onto) if onto else {}
        return join(self._storage, sizes) if onto and is_plain(onto, due(sizes)) else NOTHING

    def _whole(self, name: str, at: At) -> DeltaTable:
        """The table in the version `at`, as delta-rs has it; raises Overtaken where there is a later one."""
        if isinstance(at, DeltaTable):
            return at
        table = self.open(name)
        if table is None or table.version() != at.version():
            raise Overtaken
        return table


@dataclass(slots=True)
class _Anew:
    """What a merge makes of the files of a table: rows to be joined, new files, the sizes of files that are no more,
    and of these the ones whose keys another path has now."""

    joined: list[pa.Table] = field(default_factory=list)
    files: list[NewFile] = field(default_factory=list)
    removed: dict[str, int] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is to become of a table as it is in `onto`."""

    name: str
    onto: At | None
    anew: _Anew


def file_rows(name: str) -> int:
    """Rows of a file of the table at most, where a merge writes it."""
    return _FILE_ROWS.get(name, FILE_ROWS)


def _properties(name: str) -> dict[str, str | None]:
    return {**_PROPERTIES, **TABLES[name].properties}


def become_hdfs_user(settings: Settings) -> None:
    """Clients of HDFS, Java's too, take the user's name from the environment of the process that they start in."""
    if settings.storage.user:
        os.environ.setdefault("HADOOP_USER_NAME", settings.storage.user)


def read(table: DeltaTable | None, columns: Sequence[str]) -> Iterator[pa.Table]:
    """The columns of every row, in pieces; nothing where there is no table."""
    if table is None:
        return
    for batch in reader(table, columns):
        piece = pa.Table.from_batches([batch])
        yield piece.cast(pa.schema([(field.name, _plain(field.type)) for field in piece.schema]))


def reader(table: DeltaTable, columns: Sequence[str]) -> pa.RecordBatchReader:
    """The columns of every row as a stream."""
    names = ", ".join(f'"{column}"' for column in columns)
    found = QueryBuilder().register("rows", table).execute(f"SELECT {names} FROM rows")
    return pa.RecordBatchReader.from_stream(found)


def changed(table: DeltaTable, columns: Sequence[str], *, since: int, until: int | None = None) -> pa.Table:
    """The distinct values of `columns` in rows that came, changed or left in versions after `since`, up to `until`."""
    quoted = [f'"{column}"' for column in columns]
    feed = table.load_cdf(starting_version=since + 1, ending_version=until, columns=quoted, allow_out_of_range=True)
    schema = pa.schema([TABLES["instances"].schema.field(column) for column in columns])
    found = pa.table(pa.RecordBatchReader.from_stream(feed))
    if not len(found):
        return schema.empty_table()
    return found.select(columns).cast(schema).group_by(columns).aggregate([])


def _plain(type_: pa.DataType) -> pa.DataType:
    return pa.string() if type_ == pa.string_view() else type_


def _commit(
    onto: DeltaTable, name: str, files: Sequence[NewFile], removed: Mapping[str, int], mark: tuple[str, int] | None
) -> None:
    """A commit by delta-rs. No retry: it is for the version after the one that was read, or not at all."""
    now = int(time.time() * 1000)
    actions: list[AddAction | RemoveAction] = [
        AddAction(file.path, file.size, {}, file.modified_ms, True, file.stats) for file in files
    ]
    actions += [RemoveAction(path, True, now, size, {}) for path, size in removed.items()]
    told = CommitProperties(max_commit_retries=0, app_transactions=[Transaction(*mark)] if mark else None)
    onto.create_write_transaction(actions, "append", delta_schema(name), commit_properties=told)


def _extended(table: DeltaTable, name: str, wanted: pa.Schema) -> bool:
    """Whether the table lacked columns or a property, which it has now; raises CatalogError where a type differs."""
    have = {one.name: one.type for one in pa.schema(table.schema().to_arrow())}
    missing = [one for one in wanted if one.name not in have]
    for one in wanted:
        if one.name in have and not _same(have[one.name], one.type):
            raise CatalogError(
                f"table {name}: column {one.name} is {have[one.name]}, this version needs {one.type}; "
                "extract into a new catalog.root"
            )
    if missing:
        table.alter.add_columns([Field.from_arrow(one) for one in missing])
        table.update_incremental()
    unsaid = _KEEPS_LOG not in table.metadata().configuration
    if unsaid:  # made by an earlier version
        table.alter.set_table_properties({_KEEPS_LOG: _PROPERTIES[_KEEPS_LOG]})
        table.update_incremental()
    return bool(missing) or unsaid


def _same(have: pa.DataType, want: pa.DataType) -> bool:
    if pa.types.is_list(have) and pa.types.is_list(want):
        return _same(have.value_type, want.value_type)
    return bool(_plain(have) == want)
