"""Delta access for readers, through delta-rs: which files make up a table now, and whether that has changed.

A table that does not exist yet (nothing was extracted) has no snapshot, and answers are empty. Data are read by DuckDB
from the files of a snapshot: that gives back a whole version, whatever is committed meanwhile, until vacuum removes it.
delta-rs (60 MB of memory) is loaded by who asks for a snapshot; whether a table has moved is told by names of files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import duckdb

from sphere.catalog.rollup import MARK
from sphere.conf.errors import CatalogError
from sphere.conf.settings import Settings

if TYPE_CHECKING:
    from deltalake import DeltaTable
    from hdfs_native import Client


_LOG_FILES = (".json", ".parquet")  # what commits and checkpoints end with, once they are there


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One version of a table: its files as DuckDB reads them, and the columns that they have.

    `mark` is, of a roll-up, the version of `instances` that it shows, where its writer says so; `commit` tells the file
    of its commit from others of that name (see `CatalogTables.commit`).
    """

    name: str
    version: int
    table_id: str
    files: tuple[str, ...]
    columns: frozenset[str]
    mark: int | None = None
    commit: str = ""


class CatalogTables:
    """The Delta tables below `settings.catalog_root`, read only. Safe to share between threads."""

    def __init__(self, settings: Settings) -> None:
        self.root = settings.catalog_root.rstrip("/")
        parts = urlsplit(self.root)
        self._folder = unquote(parts.path) if parts.scheme == "file" else self.root
        self._hdfs: Client | None = None
        if parts.scheme == "hdfs":
            if settings.storage.user:
                os.environ["HADOOP_USER_NAME"] = settings.storage.user  # read by the native client, as in ingest
            from hdfs_native import Client  # 5 MB that an archive on local disk has no use for

            self._hdfs = Client(f"hdfs://{parts.netloc}")
        self._netloc = parts.netloc

    def snapshot(self, name: str, version: int | None = None) -> Snapshot | None:
        """A version of a table, the newest by default; None where the table does not exist.

        Raises CatalogError where it cannot be read.
        """
        with self._errors_of(name):
            table = self._open(name, version)
            if table is None:
                return None
            paths = table.get_add_actions().column("path").to_pylist()
            files = tuple(sorted(f"{self._folder}/{name}/{unquote(path)}" for path in paths))
            columns = frozenset(field.name for field in table.schema().fields)
            found, mark = table.version(), table.transaction_version(MARK)
            return Snapshot(name, found, str(table.metadata().id), files, columns, mark, self.commit(name, found))

    def commits(self, name: str) -> dict[int, int]:
        """Versions of a table, as far as its log reaches back, with their times in ms since 1970 (UTC).

        Empty where there is no table. Raises CatalogError where it cannot be read.
        """
        with self._errors_of(name):
            table = self._open(name)
            return {commit["version"]: commit["timestamp"] for commit in table.history()} if table else {}

    def newest(self, name: str) -> int:
        """The newest version of a table; -1 where it does not exist. Raises CatalogError where it cannot be read."""
        with self._errors_of(name):
            table = self._open(name)
            return -1 if table is None else table.version()

    def _open(self, name: str, version: int | None = None) -> DeltaTable | None:
        from deltalake import DeltaTable
        from deltalake.exceptions import TableNotFoundError

        try:
            return DeltaTable(f"{self.root}/{name}", version=version)
        except TableNotFoundError:
            return None

    @contextmanager
    def _errors_of(self, name: str) -> Iterator[None]:
        """What goes wrong with a table, as CatalogError."""
        from deltalake.exceptions import DeltaError

        try:
            yield
        except (DeltaError, OSError) as error:
            raise CatalogError(f"catalog table {name} below {self.root} cannot be read: {_plain(error)}") from None

    @property
    def is_local(self) -> bool:
        """Whether a look at a table is one at this host's disk."""
        return self._hdfs is None

    def has_moved(self, name: str, version: int) -> bool:
        """Whether a table has a commit after `version` (-1: the table did not exist). One look at one file name.

        Raises CatalogError where the storage does not answer.
        """
        return bool(self.commit(name, version + 1))

    def exists(self, name: str) -> bool:
        """Whether anything was ever committed to a table: its log has a file, be it a checkpoint, and not only one that
        is being written. One listing.

        Raises CatalogError where the storage does not answer.
        """
        path = f"{self._folder}/{name}/_delta_log"
        try:
            if self._hdfs is None:
                return any(entry.name.endswith(_LOG_FILES) for entry in Path(path).iterdir())
            return any(entry.path.endswith(_LOG_FILES) for entry in self._hdfs.list_status(urlsplit(path).path))
        except (FileNotFoundError, NotADirectoryError):
            return False
        except (OSError, RuntimeError) as error:
            raise CatalogError(f"{self.root} does not answer: {_plain(error)}") from None

    def commit(self, name: str, version: int) -> str:
        """What tells the file of a commit from others of that name, as of another catalog at this place: its size and
        when it was written; "" where it is not there (any more).

        Raises CatalogError where the storage does not answer.
        """
        path = f"{self._folder}/{name}/_delta_log/{version:020}.json"
        try:
            if self._hdfs is None:
                found = os.stat(path)  # noqa: PTH116  asked by every query: Path costs ten times as much
                return f"{found.st_size}@{found.st_mtime_ns}"
            status = self._hdfs.get_file_info(urlsplit(path).path)
            return f"{status.length}@{status.modification_time}"
        except (FileNotFoundError, NotADirectoryError):
            return ""
        except (OSError, RuntimeError) as error:
            raise CatalogError(f"{self.root} does not answer: {_plain(error)}") from None

    def connect(self, path: Path | None, *, memory_limit: str, threads: int) -> duckdb.DuckDBPyConnection:
        """A DuckDB database (None: in memory) that can read the tables' files; raises duckdb.Error."""
        config: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": memory_limit,
            "threads": threads,
            "autoinstall_known_extensions": False,
        }
        connection = duckdb.connect(str(path) if path else ":memory:", config=config)
        connection.execute("SET enable_progress_bar = false")  # it writes to the standard output of whoever serves
        if self._hdfs is not None:
            host, _, port = self._netloc.partition(":")
            # Out of fsspec's cache of instances: that is cleared in every forked child, where closing the client hangs.
            from hdfs_native.fsspec import HdfsFileSystem

            files = HdfsFileSystem(host, int(port) if port else None, skip_instance_cache=True)
            connection.register_filesystem(files)
        return connection


def _plain(error: Exception) -> str:
    """The message of an error of the native libraries in one line, without colours."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())
