"""Settling contested instances: `conflicts` says what was decided, then `instances` shows the version that won.

In this order: a run killed in between finds the row of before and every version of it again, and decides the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pyspark.sql import SparkSession

from sphere.conf.settings import Settings
from sphere.ingest.records import MemberRecord
from sphere.jobs.headers import HeadersRead, read_headers
from sphere.jobs.plan import Known, Members, known_instances
from sphere.jobs.rewrite import replace_rows
from sphere.jobs.tables import Tables, read
from sphere.jobs.versions import Place, order, place, settle

_PLACES = (("bundle", "offset"), ("kept_bundle", "kept_offset"), ("other_bundle", "other_offset"))
_COLUMNS = ("SOPInstanceUID", "kind", *(name for pair in _PLACES for name in pair))


@dataclass(frozen=True, slots=True)
class Outcome:
    """Members of the batch that `instances` shows now, those among them that replaced another, rows of `conflicts`."""

    rows: int = 0
    updated: int = 0
    conflicts: int = 0


@dataclass(slots=True)
class Decisions:
    """What is to be written for the contested instances of a batch."""

    conflicts: list[Mapping[str, Any]]
    gone: list[Mapping[str, Any]]  # keys of rows of `conflicts` that no longer hold
    winners: dict[str, MemberRecord]  # by SOP Instance UID, where `instances` does not show them yet
    replaced: dict[str, Place]  # where the row that `instances` has instead points to


def decide(tables: Tables, members: Members, contested: Mapping[Place, str], settings: Settings) -> Decisions:
    """Settle every contested SOP Instance UID from all its versions: new, in `instances` and in `conflicts`."""
    rows = known_instances(tables, tables.open("instances"), contested.values())
    before = mentioned(tables, contested.values())
    versions: dict[str, set[MemberRecord]] = {uid: set() for uid in contested.values()}
    for where, uid in contested.items():
        versions[uid] |= _found(members, [where])
    decisions = Decisions([], [], {}, {})
    for uid, records in versions.items():
        if uid in rows:
            records.add(members.find(rows[uid].place) or _nameless(uid, rows[uid]))
        known = {where for row in before.get(uid, ()) for where in places(row)}
        settled = settle(uid, records | _found(members, known), settings.ingest.on_conflict)
        decisions.conflicts += settled.conflicts
        keys = {_key(row) for row in settled.conflicts}
        decisions.gone += [row for row in before.get(uid, ()) if _key(row) not in keys]
        if uid not in rows or rows[uid].order != order(settled.winner):
            decisions.winners[uid] = settled.winner
            if uid in rows:
                decisions.replaced[uid] = rows[uid].place
    return decisions


def replace(spark: SparkSession, settings: Settings, tables: Tables, decided: Decisions, found: HeadersRead) -> None:
    """Put the winners' rows into `instances`; headers of versions that were passed over before are read now."""
    winners = {place(winner): winner for winner in decided.winners.values()}
    unread = [winner for where, winner in winners.items() if where not in found.contested]
    staged = found.staged + read_headers(spark, settings, contested=unread).staged
    replace_rows(spark, settings, tables, old=decided.replaced, new=winners.keys(), staged=staged)


def mentioned(tables: Tables, uids: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
    """What `conflicts` says of the versions of these SOP Instance UIDs."""
    wanted, found = set(uids), dict[str, list[dict[str, Any]]]()
    for piece in read(tables.open("conflicts"), _COLUMNS):
        for row in piece.to_pylist():
            if row["SOPInstanceUID"] in wanted and row["kind"] == "SOP_INSTANCE":
                found.setdefault(row["SOPInstanceUID"], []).append(row)
    return found


def places(row: Mapping[str, Any]) -> set[Place]:
    """Where the versions are that a row of `conflicts` names."""
    return {(row[bundle], row[offset]) for bundle, offset in _PLACES}


def _found(members: Members, places: Iterable[Place]) -> set[MemberRecord]:
    return {record for where in places if (record := members.find(where)) is not None}


def _key(row: Mapping[str, Any]) -> tuple[str, int, str]:
    return row["bundle"], row["offset"], row["kind"]


def _nameless(uid: str, row: Known) -> MemberRecord:
    """The member of a row whose bundle is gone: what the row itself says of it."""
    received_at, bundle, offset = row.order
    return MemberRecord(
        bundle=bundle,
        offset=offset,
        length=0,
        dataset_offset=0,
        SOPInstanceUID=uid,
        SOPClassUID="",
        StudyInstanceUID="",
        SeriesInstanceUID="",
        TransferSyntaxUID="",
        sha256=row.sha256,
        received_at=received_at,
        source_aet="",
        origin="",
    )
