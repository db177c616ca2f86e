"""Deleting and restoring, as the doors do."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import closing
from dataclasses import dataclass

from sphere.catalog.tombstones import open_tombstones
from sphere.conf.settings import Settings
from tests.support.landing import by_uid, table_rows


@dataclass(frozen=True, slots=True)
class Named:
    """What names an instance."""

    StudyInstanceUID: str
    SeriesInstanceUID: str
    SOPInstanceUID: str


def delete(settings: Settings, uids: Collection[str], *, reason: str = "", like: Settings | None = None) -> None:
    """Delete instances; studies and series as the tables of the archive have them, or `tombstones` of another one."""
    rows = {row["SOPInstanceUID"]: row for row in table_rows(like or settings, "tombstones")} if like else {}
    rows = rows or {row["SOPInstanceUID"]: row for row in table_rows(settings, "quarantine")} | by_uid(settings)
    named = [
        Named(rows[uid]["StudyInstanceUID"], rows[uid]["SeriesInstanceUID"], rows[uid]["SOPInstanceUID"])
        for uid in uids
    ]
    with closing(open_tombstones(settings)) as tombstones:
        assert tombstones.delete(named, by="test", reason=reason) == len(named)


def restore(settings: Settings, uids: Collection[str]) -> None:
    """Restore deleted instances."""
    with closing(open_tombstones(settings)) as tombstones:
        assert tombstones.restore(list(uids), by="test") == len(uids)
