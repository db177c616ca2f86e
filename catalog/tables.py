"""Delta access for readers, through delta-rs: which files make up a table now, and whether that has changed.

A table that does not exist yet (nothing was extracted) has no snapshot, and answers are empty. Data are read by DuckDB
from the files of a snapshot: that gives back a whole version, whatever is committed meanwhile, until vacuum removes it.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import duckdb
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError
from hdfs_native import Client
from hdfs_native.fsspec import HdfsFileSystem

from sphere.conf.errors import CatalogError
from sphere.conf.settings import Settings


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One version of a table: its files as DuckDB reads them, and the columns that they have."""

    name: str
    version: int
    table_id: str
    files: tuple[str, ...]
    columns: frozenset[str]


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
            self._hdfs = Client(f"hdfs://{parts.netloc}")
        self._netloc = parts.netloc

    def snapshot(self, name: str) -> Snapshot | None:
        """The newest version of a table; None where it does not exist. Raises CatalogError where it cannot be read."""
        try:
            table = DeltaTable(f"{self.root}/{name}")
            paths = table.get_add_actions().column("path").to_pylist()
        except TableNotFoundError:
            return None
        except (DeltaError, OSError) as error:
            raise CatalogError(f"catalog table {name} below {self.root} cannot be read: {_plain(error)}") from None
        files = tuple(sorted(f"{self._folder}/{name}/{unquote(path)}" for path in paths))
        columns = frozenset(field.name for field in table.schema().fields)
        return Snapshot(name, table.version(), str(table.metadata().id), files, columns)

    def has_moved(self, name: str, version: int) -> bool:
        """Whether a table has a commit after `version` (-1: the table did not exist). One look at one file name.

        Raises CatalogError where the storage does not answer.
        """
        path = f"{self._folder}/{name}/_delta_log/{version + 1:020}.json"
        if self._hdfs is None:
            return Path(path).exists()
        try:
            self._hdfs.get_file_info(urlsplit(path).path)
        except FileNotFoundError:
            return False
        except (OSError, RuntimeError) as error:
            raise CatalogError(f"{self.root} does not answer: {_plain(error)}") from None
        return True

    def connect(self, path: Path, *, read_only: bool, memory_limit: str, threads: int) -> duckdb.DuckDBPyConnection:
        """A DuckDB database that can read the tables' files; raises duckdb.Error where `path` is damaged or gone."""
        config: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": memory_limit,
            "threads": threads,
            "autoinstall_known_extensions": False,
        }
        connection = duckdb.connect(str(path), read_only=read_only, config=config)
        if self._hdfs is not None:
            host, _, port = self._netloc.partition(":")
            # Out of fsspec's cache of instances: that is cleared in every forked child, where closing the client hangs.
            files = HdfsFileSystem(host, int(port) if port else None, skip_instance_cache=True)
            connection.register_filesystem(files)
        return connection


def _plain(error: Exception) -> str:
    """The message of an error of the native libraries in one line, without colours."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())
