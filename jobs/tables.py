"""The catalog's tables as jobs write them: made on first use, committed on the very version that was read.

Commits go through delta-rs in this process, so a killed job commits nothing afterwards, and a commit that finds a
version it has not seen fails instead of landing on top of it (see docs/decisions/0006-extraction.md).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Field, QueryBuilder, Transaction
from deltalake.exceptions import CommitFailedError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction

from sphere.catalog.schema import TABLES
from sphere.conf.errors import CatalogError, JobFailed
from sphere.conf.settings import Settings

_PROPERTIES = {"delta.dataSkippingNumIndexedCols": "32"}
_GONE = "_gone"  # of a merge's source: delete the row of this key


@dataclass(frozen=True, slots=True)
class NewFile:
    """A Parquet file below a table's folder, ready to become part of the table; `size` in bytes, `stats` as JSON."""

    path: str
    size: int
    modified_ms: int
    stats: str


class Tables:
    """Delta tables below `catalog.root`, by their names in sphere.catalog.schema.TABLES."""

    def __init__(self, settings: Settings) -> None:
        become_hdfs_user(settings)
        self._root = settings.catalog_root

    def url(self, name: str) -> str:
        """Where the table is."""
        return f"{self._root}/{name}"

    def spark_url(self, path: str) -> str:
        """A path below the catalog root as Hadoop's file systems take it: they decode nothing."""
        return unquote(f"{self._root}/{path}")

    def open(self, name: str) -> DeltaTable | None:
        """The table as of now, or None where nothing was ever written to it; raises CatalogError where it cannot be
        read."""
        try:
            return DeltaTable(self.url(name))
        except TableNotFoundError:
            return None
        except OSError as error:
            raise CatalogError(f"{self.url(name)} cannot be read: {' '.join(str(error).split())}") from None

    def ensure(self, name: str) -> DeltaTable:
        """The table as of now, made or given the columns that it lacks; raises CatalogError where a type differs."""
        wanted = TABLES[name]
        table = self.open(name)
        if table is None:
            properties = {**_PROPERTIES, **wanted.properties}
            return DeltaTable.create(self.url(name), wanted.schema, configuration=properties)
        return _extended(table, name, wanted.schema)

    def merge(
        self,
        name: str,
        rows: Sequence[Mapping[str, Any]] | pa.Table,
        *,
        gone: Sequence[Mapping[str, Any]] = (),
        onto: DeltaTable | None = None,
        mark: tuple[str, int] | None = None,
    ) -> None:
        """Put `rows` in by the table's key, and take the rows of the keys `gone` out; without either do nothing.

        The commit carries `mark`, an application's name and version, and fails where the table is no longer as in
        `onto`. Raises JobFailed then.
        """
        schema = TABLES[name].schema
        if not isinstance(rows, pa.Table):
            rows = pa.Table.from_pylist(list(rows), schema=schema)
        if not len(rows) and not gone:
            return
        leaving = pa.Table.from_pylist(list(gone), schema=schema)
        source = pa.concat_tables([_flagged(rows.select(schema.names).cast(schema), False), _flagged(leaving, True)])
        match = " AND ".join(f't."{column}" = s."{column}"' for column in TABLES[name].key)
        target = onto or self.ensure(name)
        merger = target.merge(source, match, source_alias="s", target_alias="t", commit_properties=_commit(mark))
        with_deletes = merger.when_matched_delete(f's."{_GONE}"') if gone else merger
        try:
            (
                with_deletes.when_matched_update_all(except_cols=[_GONE])
                .when_not_matched_insert_all(predicate=f'NOT s."{_GONE}"', except_cols=[_GONE])
                .execute()
            )
        except CommitFailedError as error:
            raise _overtaken(name) from error

    def append(
        self, name: str, files: Sequence[NewFile], *, removed: Mapping[str, int] | None = None, onto: DeltaTable
    ) -> None:
        """Make `files` part of the table, those at the paths `removed` (with their sizes) no longer, in one commit.

        Raises JobFailed where the table is no longer as in `onto`.
        """
        actions: list[AddAction | RemoveAction] = [
            AddAction(file.path, file.size, {}, file.modified_ms, True, file.stats) for file in files
        ]
        now = int(time.time() * 1000)
        actions += [RemoveAction(path, True, now, size, {}) for path, size in (removed or {}).items()]
        try:
            onto.create_write_transaction(actions, "append", TABLES[name].schema, commit_properties=_commit(None))
        except CommitFailedError as error:
            raise _overtaken(name) from error


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


def changed(table: DeltaTable, columns: Sequence[str], *, since: int) -> pa.Table:
    """The distinct values of `columns` in rows that came, changed or left in versions after `since`."""
    quoted = [f'"{column}"' for column in columns]
    feed = table.load_cdf(starting_version=since + 1, columns=quoted, allow_out_of_range=True)
    schema = pa.schema([TABLES["instances"].schema.field(column) for column in columns])
    found = pa.table(pa.RecordBatchReader.from_stream(feed))
    if not len(found):
        return schema.empty_table()
    return found.select(columns).cast(schema).group_by(columns).aggregate([])


def _plain(type_: pa.DataType) -> pa.DataType:
    return pa.string() if type_ == pa.string_view() else type_


def _flagged(rows: pa.Table, gone: bool) -> pa.Table:
    return rows.append_column(_GONE, pa.array([gone] * len(rows), pa.bool_()))


def _commit(mark: tuple[str, int] | None) -> CommitProperties:
    """No retry: the commit is for the version after the one that was read, or not at all."""
    return CommitProperties(max_commit_retries=0, app_transactions=[Transaction(*mark)] if mark else None)


def _overtaken(name: str) -> JobFailed:
    return JobFailed(f"table {name} was changed by another process meanwhile; run the job again")


def _extended(table: DeltaTable, name: str, wanted: pa.Schema) -> DeltaTable:
    have = {field.name: field.type for field in pa.schema(table.schema().to_arrow())}
    missing = [field for field in wanted if field.name not in have]
    for field in wanted:
        if field.name in have and not _same(have[field.name], field.type):
            raise CatalogError(
                f"table {name}: column {field.name} is {have[field.name]}, this version needs {field.type}; "
                "extract into a new catalog.root"
            )
    if missing:
        table.alter.add_columns([Field.from_arrow(field) for field in missing])
        table.update_incremental()
    return table


def _same(have: pa.DataType, want: pa.DataType) -> bool:
    if pa.types.is_list(have) and pa.types.is_list(want):
        return _same(have.value_type, want.value_type)
    return bool(_plain(have) == want)
