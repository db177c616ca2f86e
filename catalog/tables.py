"""Delta access for readers, through delta-rs: which files make up a table now, and whether that has changed.

A table that does not exist yet (nothing was extracted) has no snapshot, and answers are empty. Data are read by DuckDB
from the files of a snapshot: that gives back a whole version, whatever is committed meanwhile, until vacuum removes it.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import duckdb
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError

from sphere.catalog.rollup import MARK
from sphere.conf.errors import CatalogError
from sphere.conf.settings import Settings

if TYPE_CHECKING:
    from hdfs_native import Client


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One version of a table: its files as DuckDB reads them, and the columns that they have.

    `mark` is, of a roll-up, the version of `instances` that it shows, where its writer says so.
    """

    name: str
    version: int
    table_id: str
    files: tuple[str, ...]
    columns: frozenset[str]
    mark: int | None = None


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
        try:
            table = DeltaTable(f"{self.root}/{name}", version=version)
            paths = table.get_add_actions().column("path").to_pylist()
        except TableNotFoundError:
            return None
        except (DeltaError, OSError) as error:
            raise CatalogError(f"catalog table {name} below {self.root} cannot be read: {_plain(error)}") from None
        files = tuple(sorted(f"{self._folder}/{name}/{unquote(path)}" for path in paths))
        columns = frozenset(field.name for field in table.schema().fields)
        mark = table.transaction_version(MARK)
        return Snapshot(name, table.version(), str(table.metadata().id), files, columns, mark)

    def commits(self, name: str) -> dict[int, int]:
        """Versions of a table, as far as its log reaches back, with their times in ms since 1970 (UTC).

        Empty where there is no table. Raises CatalogError where it cannot be read.
        """
        try:
            history = DeltaTable(f"{self.root}/{name}").history()
        except TableNotFoundError:
            return {}
        except (DeltaError, OSError) as error:
            raise CatalogError(f"catalog table {name} below {self.root} cannot be read: {_plain(error)}") from None
        return {commit["version"]: commit["timestamp"] for commit in history}

    def has_moved(self, name: str, version: int) -> bool:
        """Whether a table has a commit after `version` (-1: the table did not exist). One look at one file name.

        Raises CatalogError where the storage does not answer.
        """
        path = f"{self._folder}/{name}/_delta_log/{version + 1:020}.json"
        if self._hdfs is None:
            return os.path.exists(path)  # noqa: PTH110  asked by every query: Path costs ten times as much
        try:
            self._hdfs.get_file_info(urlsplit(path).path)
        except FileNotFoundError:
            return False
        except (OSError, RuntimeError) as error:
            raise CatalogError(f"{self.root} does not answer: {_plain(error)}") from None
        return True

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
