"""What the catalog version of an index does not have, as tables beside it: members that landed since, and deletions.

Each serving process holds its own, in memory. Studies that have an arrival or lost an instance are rolled up anew over
the catalog's rows and the arrivals, so that counts are right; they are in the overlay of the index with all else of
their patients. A change is one transaction: a query sees all of it or nothing. See
docs/decisions/0009-recent-arrivals.md and 0031-tombstones.md.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any

import duckdb
import pyarrow as pa

from sphere.catalog import overlay
from sphere.catalog.arrivals import RECENT, HeadersOfMembers, values_of
from sphere.catalog.arrow import empty, strings
from sphere.catalog.fold import FoldedStudy
from sphere.catalog.grant import Grant
from sphere.catalog.index_files import FileMap
from sphere.catalog.reading import instances_sql
from sphere.catalog.rollup import duckdb_type, source_columns
from sphere.catalog.schema import BY_KEYWORD, TABLES
from sphere.catalog.tail import JournalTail
from sphere.catalog.tombstones import Tombstones
from sphere.catalog.versions import Policy, Version, place, shown
from sphere.conf.errors import CatalogError, SphereError, StorageError
from sphere.ingest.records import MemberRecord

log = logging.getLogger(__name__)

CATCH_UP_S = 2.0
"""Seconds that a query gives to taking up arrivals before it answers without the rest."""
CHUNK = 1000
"""Members taken up in one transaction."""
MAX_MEMBERS = 50_000
"""Members held at most; those beyond are found when they are extracted."""
RETRY_S = 0.2
"""Seconds between attempts to read members that their writer has not published yet."""

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_ROLLED = tuple(source_columns("series") | source_columns("studies"))


@dataclass(frozen=True, slots=True)
class _Version:
    received_at: datetime
    bundle: str
    offset: int
    sha256: str


@dataclass(slots=True)
class _Known:
    """An instance: its versions, the catalogued one among them, and the studies that they are of."""

    uid: str
    versions: list[Version] = field(default_factory=list)
    studies: set[str] = field(default_factory=set)
    base: _Version | None = None


FindVersions = Callable[[Sequence[str]], dict[str, list[MemberRecord]]]
"""From SOP Instance UIDs to the versions of them that `conflicts` names."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Where arrivals come from (nowhere: an earlier version has none), what was deleted, and how they meet what is
    catalogued."""

    tail: JournalTail | None
    tombstones: Tombstones
    headers: HeadersOfMembers
    policy: Policy
    conflicting: FindVersions
    columns: frozenset[str]  # of the catalogued files of instances
    files: FileMap
    grant: Grant | None = None


def column_of(name: str) -> str:
    """The SQL expression of a column of `instances` over the rows of RECENT."""
    if name in RECENT.names:
        return f'"{name}"'
    arrow = BY_KEYWORD[name].arrow
    if pa.types.is_list(arrow):
        return f"""from_json("columns"->'$.{name}', '["{duckdb_type(arrow.value_type)}"]')"""
    return f"""CAST("columns"->>'$.{name}' AS {duckdb_type(arrow)})"""


class Recent:
    """The arrivals and deletions beside one index, which `connection` has attached as `base`, with its overlay.

    Thread-safe. `selected` gives the expression by which the index holds a column of a roll-up; what the overlay
    replaces is told through `published`.
    """

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        sources: Sources,
        selected: Callable[[str], str],
        published: overlay.Published,
    ) -> None:
        self._db = connection.cursor()
        self._sources = sources
        self._selected = selected
        self._published = published
        self._allowed = sources.grant.condition(column_of) if sources.grant else "true"
        self._lock = threading.Lock()
        self._studies: dict[str, FoldedStudy] = {}
        self._unread: list[MemberRecord] = []
        self._retry_at = 0.0
        self._full = False
        self._deletions: str | None = None  # up to which they are taken up; None before the first look
        self._buried: set[str] = set()  # instances that are here or in the catalog, and deleted
        self.members = 0
        """Members taken up so far."""
        self.differs = False
        """Whether anything may be shown otherwise than the index has it."""
        self._db.execute("SET TimeZone = 'UTC'")
        _create(self._db)

    def catch_up(self) -> None:
        """Take up all that was deleted, then what arrived, for at most about CATCH_UP_S. Without the storage, what is
        known stays; raises CatalogError where nothing is known of deletions, or they cannot be held."""
        try:
            self._bury()
        except StorageError as error:
            if self._deletions is None:
                raise CatalogError(f"what was deleted cannot be read: {error}") from None
            log.warning("deletions by other hosts cannot be seen for now: %s", error)
        except duckdb.OutOfMemoryException:
            raise CatalogError("the deletions that wait for extraction take too much memory") from None
        if self._sources.tail is not None:
            self._arrivals(self._sources.tail)

    def _bury(self) -> None:
        """Hide what was deleted since, show what was restored: all of it, before anything is answered."""
        if self._deletions is not None and not self._sources.tombstones.changes(self._deletions)[0]:
            return
        with self._lock:
            while True:
                changes, cursor = self._sources.tombstones.changes(self._deletions or "")
                deleted = {one.SOPInstanceUID for one in changes if one.deleted} - self._buried
                restored = {one.SOPInstanceUID for one in changes if not one.deleted} & self._buried
                if moved := self._held(deleted) | restored:
                    self._take_up([], [], moved)
                self._deletions = cursor
                if not changes:
                    return

    def _held(self, uids: Set[str]) -> set[str]:
        """Those of the instances that the catalog (by a hash of their UIDs) or the arrivals have."""
        if not uids:
            return set()
        self._db.register("asked", pa.table({"uid": strings(list(uids))}))
        hashes = [f"hash(uid) IN (SELECT hash FROM {source}.sop_files)" for source in self._sources.files.sources]
        condition = " OR ".join([*hashes, "uid IN (SELECT SOPInstanceUID FROM recent.arrivals)"])
        found = self._db.execute(f"SELECT uid FROM asked WHERE {condition}").fetchall()
        self._db.unregister("asked")
        return {row[0] for row in found}

    def _arrivals(self, tail: JournalTail) -> None:
        if not self._lock.acquire(timeout=CATCH_UP_S):
            return
        try:
            end = time.monotonic() + CATCH_UP_S
            while self._step(tail) and time.monotonic() < end:
                continue
        except duckdb.OutOfMemoryException:
            log.warning("recent arrivals take too much memory: further ones are found when they are extracted")
            self._full = True
        except SphereError as error:
            log.warning("recent arrivals cannot be seen for now: %s", error)
        finally:
            self._lock.release()

    def _step(self, tail: JournalTail) -> bool:
        if not self._full and self.members >= MAX_MEMBERS:
            log.warning("more than %d members wait for extraction: further ones are found after it", MAX_MEMBERS)
            self._full = True
        if self._full:
            return False
        again: list[MemberRecord] = []
        if self._unread and time.monotonic() >= self._retry_at:
            again = self._unread
        new = tail.take(CHUNK)
        if not new and not again:
            return False
        try:
            rows, unread = self._sources.headers.read([*again, *new])
            self._take_up(rows, again)
        except BaseException:
            tail.give_back(new)
            raise
        if again or unread:
            self._unread = unread if again else [*self._unread, *unread]
            self._retry_at = time.monotonic() + RETRY_S
        self.members += len(new)
        return bool(new)

    def _take_up(
        self, rows: Sequence[dict[str, Any]], again: Sequence[MemberRecord], moved: Set[str] = frozenset()
    ) -> None:
        """New `rows`, those of members that are read `again`, and instances that were deleted or restored."""
        db = self._db
        uids = sorted({row["SOPInstanceUID"] for row in rows} | moved)
        deleted = self._sources.tombstones.deleted(uids)
        db.execute("BEGIN")
        try:
            for record in again:
                db.execute('DELETE FROM recent.arrivals WHERE bundle = ? AND "offset" = ?', list(place(record)))
            self._insert(rows)
            known = self._versions(uids, deleted | moved)
            self._show(known, deleted)
            studies = self._folded(rows, again, known)
            touched = overlay.replace(
                db,
                self._published.now(),
                list(studies),
                series=_rolled("series", studies),
                studies=_rolled("studies", studies),
                selected=self._selected,
            )
            self.differs = True  # before anybody can be told of a study that is touched
            with self._published.changing(touched):
                db.execute("COMMIT")
        except BaseException:
            db.execute("ROLLBACK")
            self._studies.clear()  # they may hold what was rolled back: computed anew when touched again
            raise
        self._studies |= studies
        self._buried = (self._buried - moved) | {one.uid for one in known if one.uid in deleted}

    def _insert(self, rows: Sequence[dict[str, Any]]) -> None:
        if rows:
            self._db.register("incoming", pa.Table.from_pylist(list(rows), schema=RECENT))
            self._db.execute(f"INSERT INTO recent.arrivals SELECT *, {self._allowed} FROM incoming")
            self._db.unregister("incoming")

    def _versions(self, uids: list[str], settled: Set[str]) -> list[_Known]:
        """All that is known of the instances that have more than one version, and of those that are `settled` anew."""
        columns = 'SOPInstanceUID, epoch_us(received_at), bundle, "offset", sha256, StudyInstanceUID'
        condition = "WHERE SOPInstanceUID IN (SELECT unnest(?))"
        found = self._db.execute(f"SELECT {columns}, true FROM recent.arrivals {condition}", [uids]).fetchall()
        if files := self._sources.files.of_instances(self._db, uids):
            sql = f"SELECT {columns}, false FROM read_parquet(?, union_by_name = true) {condition}"
            found += self._db.execute(sql, [files, uids]).fetchall()
        known: dict[str, _Known] = {}
        for uid, micros, bundle, offset, sha256, study, arrived in found:
            version = _Version(_EPOCH + timedelta(microseconds=micros), bundle, offset, sha256)
            one = known.setdefault(uid, _Known(uid))
            one.versions.append(version)
            one.studies.add(study)
            one.base = one.base if arrived else version
        several = [one for one in known.values() if len(one.versions) > 1 or one.uid in settled]
        contested = [one.uid for one in several if one.base and len({v.sha256 for v in one.versions}) > 1]
        for uid, more in (self._sources.conflicting(contested) if contested else {}).items():
            known[uid].versions += more
        return several

    def _show(self, known: Sequence[_Known], deleted: Set[str]) -> None:
        """Say which version of each instance is shown: an arrival, or the catalogued one; none that is deleted."""
        if not known:
            return
        uids = [one.uid for one in known]
        winners = {one.uid: place(shown(one.versions, self._sources.policy)) for one in known if one.uid not in deleted}
        hidden = [one.uid for one in known if one.base and winners.get(one.uid) != place(one.base)]
        arrived = [winners[one.uid] for one in known if one.uid in winners and (not one.base or one.uid in hidden)]
        self._db.execute(
            f"UPDATE recent.arrivals SET shown = {self._allowed} "
            "AND (bundle || '/' || \"offset\") IN (SELECT unnest(?::VARCHAR[])) "
            "WHERE SOPInstanceUID IN (SELECT unnest(?))",
            [[f"{bundle}/{offset}" for bundle, offset in arrived], uids],
        )
        self._db.execute("DELETE FROM recent.hidden WHERE SOPInstanceUID IN (SELECT unnest(?))", [uids])
        self._db.execute("INSERT INTO recent.hidden SELECT unnest(?::VARCHAR[])", [hidden])

    def _folded(
        self, rows: Sequence[dict[str, Any]], again: Sequence[MemberRecord], known: Sequence[_Known]
    ) -> dict[str, FoldedStudy]:
        """The studies that change: those that only grow with the new rows added, the others computed anew."""
        anew = {study for one in known for study in one.studies} | {record.StudyInstanceUID for record in again}
        touched = {row["StudyInstanceUID"] for row in rows}
        anew |= touched - self._studies.keys()
        anew.discard("")
        studies = {uid: self._studies[uid] for uid in touched - anew} | {uid: FoldedStudy(uid) for uid in anew}
        for row in rows:
            values = values_of(row)
            if row["StudyInstanceUID"] not in anew and (
                self._sources.grant is None or self._sources.grant.holds(values)
            ):
                studies[row["StudyInstanceUID"]].add(values)
        for row in [*self._catalogued(sorted(anew)), *self._arrived(sorted(anew))]:
            studies[row["StudyInstanceUID"]].add(row)
        return studies

    def _catalogued(self, studies: list[str]) -> list[dict[str, Any]]:
        """What the catalog shows of some studies."""
        files = self._sources.files.of_studies(self._db, studies)
        if not files:
            return []
        columns = ", ".join(f'"{name}"' for name in _ROLLED)
        sql = (
            f"SELECT {columns} FROM {instances_sql(_ROLLED, self._sources.grant)} ANTI JOIN recent.hidden "
            "USING (SOPInstanceUID) WHERE StudyInstanceUID IN (SELECT unnest(?))"
        )
        return list(self._db.sql(sql, params=[files, studies]).to_arrow_table().to_pylist())

    def _arrived(self, studies: list[str]) -> list[dict[str, Any]]:
        """What is shown of some studies that arrived since."""
        names = ", ".join(f'"{name}"' for name in RECENT.names if name != "dataset")
        sql = f"SELECT {names} FROM recent.arrivals WHERE shown AND StudyInstanceUID IN (SELECT unnest(?::VARCHAR[]))"
        return [values_of(row) for row in self._db.sql(sql, params=[studies]).to_arrow_table().to_pylist()]


def _create(db: duckdb.DuckDBPyConnection) -> None:
    db.execute("CREATE SCHEMA memory.recent")
    db.register("arrivals_", empty(RECENT))
    db.execute("CREATE TABLE recent.arrivals AS SELECT *, true AS shown FROM arrivals_")
    db.unregister("arrivals_")
    db.execute("CREATE TABLE recent.hidden (SOPInstanceUID VARCHAR)")


def _rolled(name: str, studies: Mapping[str, FoldedStudy]) -> pa.Table:
    rows = [row for one in studies.values() for row in (one.series() if name == "series" else one.study())]
    return pa.Table.from_pylist(rows, schema=TABLES[name].schema)
