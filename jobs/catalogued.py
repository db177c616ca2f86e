"""How far each bundle is catalogued: what table `bundles` says, with a row for each bundle that there ever was.

Each extraction asks for it, and of one to the next little changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from sphere.jobs.tables import Tables

Row = Mapping[str, Any]
SEALED: Final[Row] = {"sealed": True}
"""What is kept of the row of a bundle that is catalogued to its end: most are so."""
_TABLE = "bundles"
_COLUMNS = ("bundle", "journal_bytes", "members", "sealed")


class Catalogued:
    """The rows of `bundles` by bundle, as of when they were last asked for: a file of the table never changes, and is
    read once."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._files: dict[str, list[str]] = {}  # the bundles of each file
        self._rows: dict[str, Row] = {}

    def rows(self) -> Mapping[str, Row]:
        """The rows, to be looked at until this is called again; of sealed ones only SEALED."""
        paths = self._tables.paths(_TABLE)
        self._leave(path for path in list(self._files) if path not in paths)
        for path in paths:
            if path not in self._files:
                self._come(path, self._tables.read(_TABLE, path, _COLUMNS))
        return self._rows

    def _leave(self, paths: Iterable[str]) -> None:
        for path in paths:
            for bundle in self._files.pop(path):
                self._rows.pop(bundle, None)

    def _come(self, path: str, rows: pa.Table) -> None:
        sealed = rows.filter(rows["sealed"])["bundle"].to_pylist()
        others = rows.filter(pc.invert(rows["sealed"])).to_pylist()
        self._rows |= dict.fromkeys(sealed, SEALED)
        self._rows |= {row["bundle"]: row for row in others}
        self._files[path] = [*sealed, *(row["bundle"] for row in others)]
