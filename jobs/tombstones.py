"""What people deleted and restored (sphere.catalog.tombstones), carried out in the tables.

The members of a deleted instance are in `tombstones`, so that restoring feeds them to a batch again, and in no other
table. They are written there before they leave anywhere, and leave `tombstones` when a batch has them: a run that was
killed in between is made good by the next one, which finds what is left and does it. How far the table has followed is
remembered last.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from pyspark.sql import SparkSession

from sphere.catalog.tombstones import Tombstone, open_tombstones
from sphere.conf.settings import Settings
from sphere.ingest.records import MemberRecord
from sphere.jobs.conflicts import mentioned, places
from sphere.jobs.plan import Batch, Members
from sphere.jobs.rewrite import replace_rows
from sphere.jobs.tables import Tables
from sphere.jobs.versions import Place, order, place

TABLE = "tombstones"
_PLACE = ("bundle", "offset")
_SHOWN = ("SOPInstanceUID", *_PLACE, "length")
_BURIED = (*_SHOWN, "erased_at")
_log = logging.getLogger(__name__)


class Deletions:
    """The tombstones of an archive as its tables follow them; for one extraction, under its lock."""

    def __init__(self, settings: Settings, tables: Tables) -> None:
        self._settings = settings
        self._tables = tables
        self._tombstones = open_tombstones(settings)
        self._any = False

    def close(self) -> None:
        """Let go of what was opened."""
        self._tombstones.close()

    def pending(self) -> Iterator[tuple[list[Tombstone], list[str]]]:
        """What was deleted and the SOP Instance UIDs of what was restored since this host last followed, in pieces;
        when the next one is asked for, the one before has been carried out. Raises StorageError."""
        while True:
            table = self._tables.open(TABLE)
            told = self._tombstones.told(str(table.metadata().id)) if table else ""
            changes, cursor = self._tombstones.changes(told)
            if not changes:
                return
            yield [one for one in changes if one.deleted], [one.SOPInstanceUID for one in changes if not one.deleted]
            self._tombstones.tell(str(self._tables.ensure(TABLE).metadata().id), cursor)

    def take_out(
        self, spark: SparkSession, deleted: Sequence[Tombstone], members: Members, *, on_step: Callable[[str], None]
    ) -> int:
        """Have these instances in `tombstones` only; returns how many rows left `instances`.

        The roll-ups follow `instances` by themselves. Raises JobFailed where another process writes.
        """
        by_uid = {one.SOPInstanceUID: one for one in deleted}
        shown = self._find("instances", _SHOWN, by_uid)
        rejected = self._find("quarantine", _SHOWN, by_uid)
        settled = mentioned(self._tables, by_uid)
        on_step(TABLE)
        rows = [*self._find(TABLE, _BURIED, by_uid), *_versions(settled, members), *rejected, *shown]
        erased_at = {_at(row): row["erased_at"] for row in rows if row.get("erased_at")}
        self._record(((_at(row), row["length"], by_uid[row["SOPInstanceUID"]]) for row in rows), erased_at)
        on_step("conflicts")
        self._tables.merge("conflicts", (), gone=[row for found in settled.values() for row in found])
        on_step("quarantine")
        self._tables.merge("quarantine", (), gone=rejected)
        if shown:
            on_step("replace")
            old = {row["SOPInstanceUID"]: _at(row) for row in shown}
            replace_rows(spark, self._settings, self._tables, old=old)
        return len(shown)

    def restored(self, uids: Collection[str], members: Members) -> Iterator[Batch]:
        """The members of these instances that are in `tombstones`, to go through a batch again."""
        records = []
        for row in self._find(TABLE, _PLACE, uids):
            record = members.find(_at(row))
            if record is None:
                _log.warning("%s is gone: what was restored of it cannot be read", row["bundle"])
            else:
                records.append(record)
        records.sort(key=order)
        size = self._settings.extract.batch
        for start in range(0, len(records), size):
            yield Batch(records[start : start + size], restored=True)

    def release(self, records: Iterable[MemberRecord]) -> None:
        """Take members out of `tombstones` that a batch has catalogued."""
        gone = [{"bundle": record.bundle, "offset": record.offset} for record in records]
        self._tables.merge(TABLE, (), gone=gone)

    def bury(self, found: Iterable[tuple[MemberRecord, str]]) -> set[Place]:
        """Of members and the SOP Instance UIDs that they have, put those of deleted instances into `tombstones`; their
        places. Raises StorageError and JobFailed."""
        self._any = self._any or bool(self._tombstones.count())
        if not self._any:
            return set()
        members = list(found)
        gone = self._tombstones.deleted([uid for _, uid in members])
        by_uid = {one.SOPInstanceUID: one for one in self._tombstones.find(sop=sorted(gone))} if gone else {}
        buried = {place(record): (record, by_uid[uid]) for record, uid in members if uid in by_uid}
        self._record((where, record.length, one) for where, (record, one) in buried.items())
        return set(buried)

    def _record(
        self, members: Iterable[tuple[Place, int, Tombstone]], erased_at: Mapping[Place, datetime] | None = None
    ) -> None:
        since = erased_at or {}
        rows = {where: {**_row(where, length, one), "erased_at": since.get(where)} for where, length, one in members}
        self._tables.merge(TABLE, list(rows.values()))

    def _find(self, name: str, columns: Sequence[str], uids: Collection[str]) -> list[dict[str, Any]]:
        """`columns` of the rows of a table that have one of the SOP Instance UIDs."""
        at = self._tables.current(name)
        found: list[dict[str, Any]] = self._tables.find(
            name, columns, key="SOPInstanceUID", values=uids, at=at
        ).to_pylist()
        return found


def waiting(settings: Settings) -> bool:
    """Whether something was deleted or restored that this host's tables do not follow yet."""
    deletions = Deletions(settings, Tables(settings))
    try:
        return next(deletions.pending(), None) is not None
    finally:
        deletions.close()


def _at(row: Mapping[str, Any]) -> Place:
    return row["bundle"], row["offset"]


def _versions(settled: Mapping[str, Iterable[Mapping[str, Any]]], members: Members) -> Iterator[dict[str, Any]]:
    """The members that rows of `conflicts` name, by their SOP Instance UID."""
    for uid, rows in settled.items():
        for bundle, offset in {where for row in rows for where in places(row)}:
            record = members.find((bundle, offset))
            length = record.length if record else 0
            yield {"SOPInstanceUID": uid, "bundle": bundle, "offset": offset, "length": length}


def _row(where: Place, length: int, one: Tombstone) -> dict[str, Any]:
    return {
        "bundle": where[0],
        "offset": where[1],
        "SOPInstanceUID": one.SOPInstanceUID,
        "StudyInstanceUID": one.StudyInstanceUID,
        "SeriesInstanceUID": one.SeriesInstanceUID,
        "length": length,
        "deleted_at": datetime.fromisoformat(one.at),
        "deleted_by": one.by,
        "reason": one.reason,
    }
