"""Annotations of what was deleted: who may not delete is not shown them, until it is shown again itself."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from sphere.catalog.annotations import Version
from sphere.catalog.queries import Queries
from sphere.catalog.query import Query
from sphere.catalog.schema import UNIQUE_KEY, Level
from sphere.catalog.tombstones import Tombstones

_WHOLE: Final[tuple[Level, ...]] = ("STUDY", "SERIES")


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """Asks the tombstones and, of studies and series, whether anything of them is shown. See
    docs/decisions/0031-tombstones.md."""

    tombstones: Tombstones
    catalog: Queries

    def any(self) -> bool:
        """Whether anything was ever deleted; costs next to nothing where not. Raises StorageError."""
        return bool(self.tombstones.state())

    def among(self, uids: Collection[str]) -> set[str]:
        """Those of the UIDs, of studies, series and instances, of which everything is deleted.

        Raises StorageError and CatalogError.
        """
        instances, others = self.tombstones.named(uids)
        return instances | (others - self._shown(others))

    def has(self, version: Version) -> bool:
        """Whether this is linked to such a one."""
        return bool(self.among([getattr(version, UNIQUE_KEY[version.level])]))

    def _shown(self, uids: Collection[str]) -> set[str]:
        """Those that are of a study or series of which something is shown."""
        found: set[str] = set()
        for level in _WHOLE if uids else ():
            name = UNIQUE_KEY[level]
            query = Query.build(level, {name: sorted(uids)})
            found |= {str(getattr(match.identifier(), name)) for match in self.catalog.find(query)}
        return found
