"""What the tables tell of the archive itself: sizes, what was put aside and why, and what is sent on."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Final

import duckdb

from sphere.catalog.tables import CatalogTables
from sphere.conf.errors import CatalogError
from sphere.conf.settings import Settings

COUNTED: Final = ("patients", "studies", "series", "instances", "quarantine", "conflicts")
_REJECTED: Final = (
    "epoch_ms(received_at) AS received_ms, reason, detail, SOPInstanceUID, StudyInstanceUID, source_aet, origin, "
    'bundle, "offset", length'
)
_FORWARDS: Final = (
    "forward, destination, sum(sent)::BIGINT AS sent, sum(len(instances))::BIGINT AS waiting, "
    "max(CASE WHEN state = 'waiting' THEN attempts END) AS attempts, "
    "arg_max(CASE WHEN state = 'waiting' THEN last_error END, updated_at) AS last_error"
)


class Overview:
    """Small questions to the tables. Safe to share between threads; methods raise CatalogError."""

    def __init__(self, settings: Settings) -> None:
        self._tables = CatalogTables(settings)
        self._lock = threading.Lock()
        self._opened: duckdb.DuckDBPyConnection | None = None

    def close(self) -> None:
        """Let go of DuckDB."""
        with self._lock:
            if self._opened is not None:
                self._opened.close()
                self._opened = None

    def counts(self) -> dict[str, int]:
        """Rows of the tables COUNTED."""
        return {name: self._ask(name, "count(*) AS n", default=[{"n": 0}])[0]["n"] for name in COUNTED}

    def catalogued(self) -> int:
        """Members of bundles that are catalogued, rejected ones included."""
        total = self._ask("bundles", "sum(members)::BIGINT AS n", default=[{"n": 0}])[0]["n"]
        return int(total or 0)

    def reasons(self) -> dict[str, int]:
        """Members in quarantine by reason."""
        found = self._ask("quarantine", "reason, count(*) AS n", "GROUP BY reason ORDER BY n DESC, reason")
        return {row["reason"]: row["n"] for row in found}

    def rejected(self, *, limit: int, offset: int) -> list[dict[str, Any]]:
        """Members in quarantine, the latest first; times in ms since 1970 (UTC)."""
        order = 'ORDER BY received_at DESC, bundle, "offset" LIMIT ? OFFSET ?'
        return self._ask("quarantine", _REJECTED, order, (limit, offset))

    def forwards(self) -> list[dict[str, Any]]:
        """What each of [[forwards]] has sent and has to send, in instances, with its last failure."""
        return self._ask("forwards", _FORWARDS, "GROUP BY forward, destination ORDER BY forward, destination")

    def _ask(
        self,
        name: str,
        columns: str,
        rest: str = "",
        values: Sequence[int] = (),
        *,
        default: Sequence[dict[str, Any]] = (),
    ) -> list[dict[str, Any]]:
        snapshot = self._tables.snapshot(name)
        if snapshot is None or not snapshot.files:
            return list(default)
        sql = f"SELECT {columns} FROM read_parquet(?, union_by_name = true) {rest}"
        try:
            with self._connection() as cursor:
                found = cursor.execute(sql, [list(snapshot.files), *values])
                names = [column[0] for column in found.description]
                return [dict(zip(names, row, strict=True)) for row in found.fetchall()]
        except duckdb.Error as error:
            raise CatalogError(f"catalog table {name} cannot be read: {error}") from None

    def _connection(self) -> duckdb.DuckDBPyConnection:
        with self._lock:
            if self._opened is None:
                self._opened = self._tables.connect(None, memory_limit="256MB", threads=1)
            return self._opened.cursor()
