"""What somebody may see of an archive: the instances of some collections, and those of some studies, series, patients.

A catalog restricted to a grant answers as that of an archive which holds the granted instances alone: its roll-ups are
made of them, in an index of its own (see docs/decisions/0027-collections.md).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import duckdb

_KINDS = ("StudyInstanceUID", "SeriesInstanceUID", "PatientID")


@dataclass(frozen=True)
class Grant:
    """Instances of which one of these holds: its collections have one of `collections`, or it is of one of the studies,
    series or patients. Empty: nothing."""

    collections: frozenset[str] = frozenset()
    studies: frozenset[str] = frozenset()
    series: frozenset[str] = frozenset()
    patients: frozenset[str] = frozenset()

    @cached_property
    def digest(self) -> str:
        """A name that no other grant has."""
        digest = hashlib.sha256()
        for kind, names in (("collections", self.collections), *self._listed):
            digest.update(f"{kind}:{len(names)};".encode())
            for name in sorted(names):
                digest.update(f"{len(name)}:{name}".encode())
        return digest.hexdigest()[:32]

    @property
    def _schema(self) -> str:
        """The database in memory that `attach` makes, and that `condition` reads."""
        return f"granted_{self.digest}"

    @property
    def _listed(self) -> tuple[tuple[str, frozenset[str]], ...]:
        return tuple(zip(_KINDS, (self.studies, self.series, self.patients), strict=True))

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of `instances` is granted."""
        if not self.collections.isdisjoint(row.get("collections") or ()):
            return True
        return any((row.get(keyword) or "").strip(" ") in names for keyword, names in self._listed if names)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of `instances` that `condition` asks for."""
        return ("collections", *_KINDS)

    def attach(self, db: duckdb.DuckDBPyConnection) -> None:
        """Give a database what `condition` compares with, once; raises duckdb.Error."""
        db.execute(f"ATTACH ':memory:' AS {self._schema}")
        for keyword, names in self._listed:
            source = "SELECT unnest(?::VARCHAR[]) AS name"
            db.execute(f'CREATE TABLE {self._schema}.main."{keyword}" AS {source}', [list(names)])
        names_of = f"CREATE TABLE {self._schema}.main.collections AS SELECT ?::VARCHAR[] AS names"
        db.execute(names_of, [list(self.collections)])

    def condition(self, column: Callable[[str], str]) -> str:
        """SQL of what `holds` says, true or false, given the expressions of the columns of `instances`."""
        parts = []
        if self.collections:
            parts.append(f"list_has_any({column('collections')}, (SELECT names FROM {self._schema}.main.collections))")
        for keyword, names in self._listed:
            if names:
                parts.append(f"trim({column(keyword)}, ' ') IN (SELECT name FROM {self._schema}.main.\"{keyword}\")")
        return f"coalesce({' OR '.join(parts)}, false)" if parts else "false"
