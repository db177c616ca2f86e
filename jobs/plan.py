"""What is new in the journals, and what is to be done with each member: decided before any header is read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sphere.ingest.journal import Landed
from sphere.ingest.records import Member, MemberRecord
from sphere.jobs.opened import At
from sphere.jobs.tables import Tables
from sphere.jobs.versions import Order, Place, order, place

_KNOWN = ("SOPInstanceUID", "sha256", "received_at", "bundle", "offset")


@dataclass(slots=True)
class Batch:
    """Members to be catalogued together, and the rows of `bundles` that say so once they are.

    Those that are `restored` are of instances that were deleted, and are in no bundle's row anew.
    """

    records: list[MemberRecord] = field(default_factory=list)
    bundles: list[dict[str, Any]] = field(default_factory=list)
    restored: bool = False

    def without(self, places: Collection[Place]) -> Batch:
        """The batch without the members at these places."""
        return replace(self, records=[one for one in self.records if place(one) not in places]) if places else self


@dataclass(frozen=True, slots=True)
class Known:
    """The member that `instances` shows for a SOP Instance UID."""

    sha256: str
    order: Order

    @property
    def place(self) -> Place:
        """Bundle and offset."""
        return self.order[1], self.order[2]


@dataclass(slots=True)
class Plan:
    """A batch, sorted out by what the journals say of its members and what `instances` holds.

    ``new`` are the only versions of instances that have no row: their rows go straight in. ``contested`` are those
    that have to be settled against other versions once their headers are known to be good. ``present`` are rows already
    (of a run that was killed), ``copies`` lists by the place of a version its further copies in this batch, and
    ``duplicates`` counts the copies of what is catalogued.
    """

    new: list[MemberRecord] = field(default_factory=list)
    contested: list[MemberRecord] = field(default_factory=list)
    present: list[MemberRecord] = field(default_factory=list)
    copies: dict[Place, list[MemberRecord]] = field(default_factory=dict)
    duplicates: int = 0


def batches(landed: Landed, done: Mapping[str, Mapping[str, Any]], size: int) -> Iterator[Batch]:
    """What landed and is not catalogued, in the order of the bundles, `size` members at a time.

    `done` has the rows of `bundles` by bundle.
    """
    batch = Batch()
    for state in landed.bundles(skip=_Sealed(done)):
        before = done.get(state.bundle, {"journal_bytes": 0, "members": 0})
        position, members = before["journal_bytes"], before["members"]
        if state.journal_size <= position:
            continue
        lines = landed.lines(state.bundle, from_byte=position)
        found = lines.members
        while len(batch.records) + len(found) > size:
            part = found[: size - len(batch.records)]
            found = found[len(part) :]
            position += sum(len(one.to_json()) + 1 for one in part)
            members += len(part)
            batch.records += _there(part)
            if part:
                batch.bundles.append(_row(state.bundle, position, members, False))
            yield batch
            batch = Batch()
        batch.records += _there(found)
        batch.bundles.append(_row(state.bundle, lines.next_byte, members + len(found), lines.sealed is not None))
    if batch.bundles:
        yield batch


@dataclass(frozen=True, slots=True)
class _Sealed:
    """The bundles that are catalogued to their ends."""

    rows: Mapping[str, Mapping[str, Any]]

    def __contains__(self, bundle: object) -> bool:
        row = self.rows.get(bundle) if isinstance(bundle, str) else None
        return row is not None and row["sealed"]


def _there(members: Iterable[Member]) -> list[MemberRecord]:
    """Those whose bytes did not go at compaction."""
    return [one for one in members if isinstance(one, MemberRecord)]


def _row(bundle: str, journal_bytes: int, members: int, sealed: bool) -> dict[str, Any]:
    return {"bundle": bundle, "journal_bytes": journal_bytes, "members": members, "sealed": sealed}


def known_instances(tables: Tables, instances: At | None, uids: Iterable[str]) -> dict[str, Known]:
    """By SOP Instance UID, the member that `instances` shows, for those of `uids` that have a row."""
    rows = tables.find("instances", _KNOWN, key="SOPInstanceUID", values=set(uids) - {""}, at=instances)
    columns = (column.to_pylist() for column in rows.columns)
    return {uid: Known(sha256, tuple(where)) for uid, sha256, *where in zip(*columns, strict=True)}


def plan(records: Iterable[MemberRecord], known: Mapping[str, Known]) -> Plan:
    """Sort a batch out. Members without a SOP Instance UID are each a version of its own."""
    result = Plan()
    versions: dict[str, dict[str, MemberRecord]] = {}
    for record in sorted(records, key=order):
        if not record.SOPInstanceUID:
            result.new.append(record)
            continue
        first = versions.setdefault(record.SOPInstanceUID, {}).setdefault(record.sha256, record)
        if first is not record:
            result.copies.setdefault(place(first), []).append(record)
    for uid, by_digest in versions.items():
        _sort_out(result, list(by_digest.values()), known.get(uid))
    return result


def _sort_out(result: Plan, versions: list[MemberRecord], row: Known | None) -> None:
    if row is None:
        (result.new if len(versions) == 1 else result.contested).extend(versions)
        return
    for version in versions:
        if place(version) == row.place:
            result.present.append(version)
        elif version.sha256 == row.sha256 and order(version) > row.order:
            result.duplicates += 1
        else:
            result.contested.append(version)


class Members:
    """The journal record of any member, by its place; a bundle's journal is read once."""

    def __init__(self, landed: Landed, records: Iterable[MemberRecord] = ()) -> None:
        self._records: Callable[[str], list[MemberRecord]] = lambda bundle: landed.records(bundle)[0]
        self._by_place = {place(record): record for record in records}
        self._read: set[str] = set()

    def find(self, where: Place) -> MemberRecord | None:
        """The record, or None where its bundle is no longer there."""
        if where not in self._by_place and where[0] not in self._read:
            self._read.add(where[0])
            self._by_place |= {place(record): record for record in self._records(where[0])}
        return self._by_place.get(where)
