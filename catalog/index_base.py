"""The base of an index, attached to make refreshes beside it.

What a refresh reads of a base, the key indexes of its tables first of all, takes as long to load as all else of it.
Who makes one refresh after the other keeps the base attached for the next one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb

from sphere.catalog.index_note import attach
from sphere.catalog.rows import RowStore, open_beside
from sphere.catalog.tables import CatalogTables

log = logging.getLogger(__name__)

MADE = "made_now"
"""The database that is being made, while a base is attached beside it."""
KEPT_MEMORY = "400MB"


class AttachedBase:
    """The last base that was asked for, kept attached. Thread-safe: one at a time.

    DuckDB may take `memory_limit`; KEPT_MEMORY of what it read stays in memory while nothing is made.
    """

    def __init__(self, tables: CatalogTables, *, memory_limit: str, threads: int) -> None:
        self._tables, self._memory_limit, self._threads = tables, memory_limit, threads
        self._lock = threading.Lock()
        self._base: tuple[Path, int, int] | None = None
        self._db: duckdb.DuckDBPyConnection | None = None
        self._rows: RowStore | None = None

    @contextmanager
    def beside(self, base: Path, making: Path | None) -> Iterator[tuple[duckdb.DuckDBPyConnection, RowStore | None]]:
        """A connection to the database at `making` (None: in memory), with `base` attached under that name, and the
        rows of the base, if they are there.

        Raises duckdb.Error and OSError; then, or if the body raises, nothing is kept.
        """
        with self._lock:
            try:
                db = self._opened(base)
                with db.cursor() as cursor:
                    quoted = str(making or ":memory:").replace("'", "''")
                    cursor.execute(f"ATTACH '{quoted}' AS {MADE}")
                    cursor.execute(f"USE {MADE}")
                    yield cursor, self._rows
                    cursor.execute("USE memory")
                    cursor.execute(f"DETACH {MADE}")
            except BaseException:
                self._forget()
                raise
            try:
                for limit in (KEPT_MEMORY, self._memory_limit):  # what is beyond a limit goes at once
                    db.execute(f"SET memory_limit = '{limit}'")
            except duckdb.Error:  # more than that cannot be let go of one by one
                self._forget()

    def forget(self) -> None:
        """Let go of it."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        if self._db is not None:
            self._db.close()
        self._base = self._db = self._rows = None

    def _opened(self, base: Path) -> duckdb.DuckDBPyConnection:
        found = base.stat()
        wanted = base, found.st_ino, found.st_mtime_ns
        if self._db is None or self._base != wanted:
            self._forget()
            self._db = self._tables.connect(None, memory_limit=self._memory_limit, threads=self._threads)
            quoted = str(base.with_name("spill")).replace("'", "''")
            self._db.execute(f"SET temp_directory = '{quoted}'")
            attach(self._db, base, "base")
            self._base = wanted
        if self._rows is None or self._rows.have_changed():
            self._rows = open_beside(base)
        return self._db
