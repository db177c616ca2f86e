"""Compaction: the bytes of what was deleted a while ago leave the bundles, and nothing else moves.

What goes is decided before the first byte does: the event `erased` (sphere.catalog.tombstones), after which nothing can
be restored. Then bundle by bundle (sphere.ingest.erasing), and last the column `erased_at` of table `tombstones`. A run
that was killed is made good by the next one, which finds what is left and does it. Needs no Spark. See
docs/decisions/0032-compaction.md.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from typing import Any, Final

import orjson
from deltalake import DeltaTable, QueryBuilder
from deltalake.exceptions import DeltaError

from sphere.catalog.lock import CatalogLock
from sphere.catalog.schema import TABLES
from sphere.catalog.tombstones import Tombstones, open_tombstones
from sphere.conf.errors import JobFailed, SettingsError, StorageError
from sphere.conf.settings import Settings
from sphere.ingest.erasing import Erasure, erase
from sphere.ingest.folders import BUNDLES
from sphere.ingest.journal import Landed, journal_path
from sphere.ingest.lock import BundleLock
from sphere.ingest.records import MemberRecord
from sphere.ingest.spool import in_use, spool_storage
from sphere.ingest.storage import open_storage
from sphere.jobs.compact_report import CompactReport
from sphere.jobs.conflicts import mentioned, places
from sphere.jobs.tables import Tables, read
from sphere.jobs.tombstones import TABLE
from sphere.jobs.vacuum import vacuum as vacuum_tables
from sphere.jobs.versions import Place

OnStep = Callable[..., None]
STEPS: Final = (
    "lock", "plan", "mark", "copy", "check", "rename", "journal", "remove", "remove journal", "tombstones", "vacuum",
    "done",
)  # fmt: skip
"""Names that `on_step` is called with; from "copy" on for each bundle, with how many are done of how many."""

YOUNG, UNCATALOGUED, SHOWN = "deleted too lately", "in bundles that are not catalogued yet", "still in the tables"
_GUARDED_AT_ONCE = 200  # bundles whose rows are asked for in one statement
_CONFLICTS = ("kind", "bundle", "offset", "kept_bundle", "kept_offset", "other_bundle", "other_offset")
_KEYED = re.compile(rb'"(SOPInstanceUID|sha256)":"((?:[^"\\]|\\.)*)"')


def run(
    settings: Settings,
    *,
    after: timedelta | None = None,
    dry_run: bool = False,
    vacuum: timedelta | None = None,
    on_step: OnStep | None = None,
) -> CompactReport:
    """Erase what was deleted `after` ago or longer (default: ``compact.after_days``), and with `vacuum` the files and
    the log of tables' versions that were replaced as long ago as that.

    A `dry_run` changes nothing. Raises LockHeld while another process writes the catalog (after waiting
    ``extract.lock_wait_s``), JobFailed, SettingsError with ``catalog.mode = "files"``.
    """
    if settings.catalog.mode == "files":
        raise SettingsError('catalog.mode is "files": what is deleted is in no table, and its bytes are not looked for')
    tell = on_step or (lambda *_: None)
    began = time.monotonic()
    until = datetime.now(timezone.utc) - (timedelta(days=settings.compact.after_days) if after is None else after)
    tell("lock")
    with CatalogLock(settings, job="compact") as lock, closing(open_tombstones(settings)) as tombstones, _failures():
        job = _Compaction(settings, tombstones, lock, tell)
        report = job.run(until, dry_run=dry_run)
        if vacuum is not None:
            tell("vacuum")
            files, size, failures = vacuum_tables(Tables(settings), settings, older_than=vacuum, dry_run=dry_run)
            failures = {**report.failures, **failures}
            report = replace(report, vacuumed=files, vacuumed_bytes=size, failures=failures)
    tell("done")
    return replace(report, seconds=time.monotonic() - began)


@dataclass(frozen=True, slots=True)
class Pending:
    """What is deleted and has its bytes: instances, members and bytes, as table `tombstones` says."""

    instances: int
    members: int
    bytes: int


def pending(tables: Tables) -> Pending:
    """What waits for compaction, whenever it was deleted."""
    rows = list(_rows(tables.open(TABLE), ("SOPInstanceUID", "length")))
    return Pending(len({row["SOPInstanceUID"] for row in rows}), len(rows), sum(row["length"] for row in rows))


@contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except DeltaError as error:
        raise JobFailed(f"compaction stopped: the catalog could not be read or written: {error}") from error


def _rows(table: DeltaTable | None, columns: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Rows of `tombstones` whose bytes are not known to be gone."""
    if table is None:
        return
    there = {field.name for field in table.schema().fields}
    for piece in read(table, [name for name in (*columns, "erased_at") if name in there]):
        for row in piece.to_pylist():
            if row.pop("erased_at", None) is None:
                yield row


@dataclass(slots=True)
class _Plan:
    """What goes: by bundle, the SOP Instance UID of the member at each offset; and what stays for now, by why."""

    rows: list[dict[str, Any]]
    bundles: dict[str, dict[int, str]] = field(default_factory=dict)
    lengths: dict[Place, int] = field(default_factory=dict)
    held: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    named: set[Place] = field(default_factory=set)  # places that are in table `tombstones`
    first: set[str] = field(default_factory=set)  # with members known by the bytes of those in other bundles

    def add(self, bundle: str, offset: int, uid: str) -> None:
        self.bundles.setdefault(bundle, {})[offset] = uid

    def keep_only(self, uids: set[str]) -> None:
        """Leave out the members of all other instances."""
        self.rows = [row for row in self.rows if row["SOPInstanceUID"] in uids]
        kept = {
            bundle: {offset: uid for offset, uid in members.items() if uid in uids}
            for bundle, members in self.bundles.items()
        }
        in_order = sorted(kept, key=lambda bundle: (bundle not in self.first, bundle))
        self.bundles = {bundle: kept[bundle] for bundle in in_order if kept[bundle]}

    @property
    def uids(self) -> set[str]:
        """Instances of which something goes."""
        return {uid for members in self.bundles.values() for uid in members.values()}

    def report(self, bundles: int) -> CompactReport:
        """What would be done."""
        places = [(bundle, offset) for bundle, members in self.bundles.items() for offset in members]
        return CompactReport(
            bundles=bundles,
            rewritten=len(self.bundles),
            instances=len(self.uids),
            members=len(places),
            bytes=sum(self.lengths.get(place, 0) for place in places),
            waiting=Counter(self.held.values()),
            failures=self.failures,
            dry_run=True,
        )


class _Compaction:
    """One run, under the lock."""

    def __init__(self, settings: Settings, tombstones: Tombstones, lock: CatalogLock, tell: OnStep) -> None:
        self._settings, self._tombstones, self._lock, self._tell = settings, tombstones, lock, tell
        self._tables = Tables(settings)
        self._storage = open_storage(settings.storage.root, user=settings.storage.user)
        self._landed = Landed(self._storage)

    def run(self, until: datetime, *, dry_run: bool) -> CompactReport:
        self._tell("plan")
        plan, looked_at = self._plan(until)
        if dry_run or not plan.bundles:
            return replace(plan.report(looked_at), dry_run=dry_run)
        self._tell("mark")
        erased = self._tombstones.erase(sorted(plan.uids), until=until)
        for uid in plan.uids - erased:
            plan.held[uid] = YOUNG  # restored, or deleted anew, a moment ago
        plan.keep_only(erased)
        self._lock.check()
        done = self._erase(plan)
        failed = {uid for bundle in plan.failures for uid in plan.bundles.get(bundle, {}).values()}
        if plan.failures.keys() - plan.bundles.keys():  # journals that could not be read: there may be copies
            failed = plan.uids
        self._lock.check()
        self._tell("tombstones")
        now = datetime.now(timezone.utc)
        gone = [{**row, "erased_at": now} for row in plan.rows if row["SOPInstanceUID"] not in failed]
        self._tables.merge(TABLE, gone)
        return CompactReport(
            bundles=looked_at,
            rewritten=sum(1 for one in done if one.members and not one.removed),
            removed=sum(one.removed for one in done),
            instances=len(plan.uids - failed),
            members=sum(one.members for one in done),
            bytes=sum(one.size for one in done),
            freed=sum(one.freed for one in done),
            waiting=Counter(plan.held.values()),
            failures=plan.failures,
        )

    def _plan(self, until: datetime) -> tuple[_Plan, int]:
        """What goes, and how many bundles were looked at."""
        names = [name for name in TABLES[TABLE].schema.names if name != "erased_at"]
        plan = _Plan(list(_rows(self._tables.open(TABLE), names)))
        due = self._due(plan, until)
        if not due:
            plan.keep_only(set())
            return plan, 0
        for row in plan.rows:
            if row["SOPInstanceUID"] in due:
                plan.add(row["bundle"], row["offset"], row["SOPInstanceUID"])
                plan.lengths[row["bundle"], row["offset"]] = row["length"]
                plan.named.add((row["bundle"], row["offset"]))
        looked_at = self._find_copies(plan, due)
        plan.keep_only(due - plan.held.keys())
        self._guard(plan)
        return plan, looked_at

    def _due(self, plan: _Plan, until: datetime) -> set[str]:
        """Instances that were deleted by `until`, and have left the tables."""
        latest = until.isoformat(timespec="microseconds")
        uids = {row["SOPInstanceUID"] for row in plan.rows}
        found = {one.SOPInstanceUID: one for one in self._tombstones.find(sop=sorted(uids))} if uids else {}
        due = {uid for uid, one in found.items() if one.erased or one.at <= latest}
        plan.held |= dict.fromkeys(uids - due, YOUNG)
        shown: set[str] = set(mentioned(self._tables, due))
        for name in ("instances", "quarantine"):
            rows = self._tables.find(
                name, ("SOPInstanceUID",), key="SOPInstanceUID", values=due, at=self._tables.open(name)
            )
            shown |= set(rows["SOPInstanceUID"].to_pylist())
        plan.held |= dict.fromkeys(shown, SHOWN)
        return due - shown

    def _find_copies(self, plan: _Plan, due: set[str]) -> int:
        """Find every member of these instances in the journals: copies are in no table. Those of an instance are what
        its journal line names so, and what has the same bytes. Returns how many bundles there are."""
        by_digest = self._digests(plan)
        wanted = {orjson.dumps(uid)[1:-1]: uid for uid in due}
        keys = wanted.keys() | {digest.encode() for digest in by_digest}
        finished, spooled = self._finished(), self._spooled()
        paths = [entry.path for entry in self._storage.walk(BUNDLES)]
        bundles = sorted(
            {path.removesuffix(".journal") + ".tar" if path.endswith(".journal") else path for path in paths}
        )
        for number, bundle in enumerate(bundles):
            self._tell("plan", number, len(bundles))
            try:
                data = self._storage.read(journal_path(bundle)) if self._has_journal(bundle, finished) else b""
                if keys.isdisjoint(value for _, value in _KEYED.findall(data)):
                    continue
                for record in self._landed.records(bundle)[0]:
                    uid = record.SOPInstanceUID if record.SOPInstanceUID in due else by_digest.get(record.sha256)
                    if uid is None:
                        continue
                    if bundle not in finished or bundle in spooled:
                        plan.held[uid] = UNCATALOGUED
                        continue
                    plan.add(bundle, record.offset, uid)
                    plan.lengths[bundle, record.offset] = record.length
                    if uid != record.SOPInstanceUID:
                        plan.first.add(bundle)
            except StorageError as error:
                plan.failures[bundle] = str(error)
        return len(bundles)

    def _has_journal(self, bundle: str, finished: set[str]) -> bool:
        """One that is being begun may have none yet; of a catalogued one that is an error."""
        return bundle in finished or self._storage.exists(journal_path(bundle))

    def _digests(self, plan: _Plan) -> dict[str, str]:
        """By digest, the instance of the members that table `tombstones` names."""
        found: dict[str, str] = {}
        for bundle, members in plan.bundles.items():
            try:
                records = self._landed.records(bundle)[0] if self._storage.exists(bundle) else []
            except StorageError as error:
                plan.failures[bundle] = str(error)
                continue
            found |= {one.sha256: members[one.offset] for one in records if _has_bytes(one) and one.offset in members}
        return found

    def _finished(self) -> set[str]:
        """Bundles that are sealed, and catalogued to the end."""
        found: set[str] = set()
        for piece in read(self._tables.open("bundles"), ("bundle", "sealed")):
            found |= set(piece.filter(piece["sealed"])["bundle"].to_pylist())
        return found

    def _spooled(self) -> set[str]:
        """Bundles that this host has not done with shipping."""
        if not in_use(self._settings):
            return set()
        return {entry.path for entry in spool_storage(self._settings).walk(BUNDLES)}

    def _guard(self, plan: _Plan) -> None:
        """Leave alone what a table has, whatever else was thought of it: a header may name another instance than the
        journal does. Where `tombstones` has the member too, its whole bundle is."""
        bundles = sorted(plan.bundles)
        for bundle, offset in self._kept(bundles):
            if (bundle, offset) in plan.named:
                plan.failures[bundle] = f"bundle {bundle}: a table has the member at byte {offset}: left alone"
            else:
                plan.bundles.get(bundle, {}).pop(offset, None)
        plan.keep_only(plan.uids - {uid for one in plan.failures for uid in plan.bundles.get(one, {}).values()})

    def _kept(self, bundles: Sequence[str]) -> Iterator[Place]:
        """The places in these bundles that tables other than `tombstones` have."""
        wanted = set(bundles)
        for piece in read(self._tables.open("conflicts"), _CONFLICTS):
            for row in piece.to_pylist():
                if row["kind"] == "SOP_INSTANCE":
                    yield from (place for place in places(row) if place[0] in wanted)
        for name in ("instances", "quarantine"):
            table = self._tables.open(name)
            if table is None:
                continue
            for start in range(0, len(bundles), _GUARDED_AT_ONCE):
                listed = ", ".join(_quoted(one) for one in bundles[start : start + _GUARDED_AT_ONCE])
                sql = f'SELECT bundle, "offset" FROM rows WHERE bundle IN ({listed})'
                for batch in QueryBuilder().register("rows", table).execute(sql):
                    columns = [column.to_pylist() for column in batch.columns]
                    yield from zip(*columns, strict=True)

    def _erase(self, plan: _Plan) -> list[Erasure]:
        done = []
        for number, (bundle, members) in enumerate(plan.bundles.items()):
            self._lock.check()
            try:
                done.append(self._of_bundle(bundle, members, number, len(plan.bundles)))
            except StorageError as error:
                plan.failures[bundle] = str(error)
        return done

    def _of_bundle(self, bundle: str, members: Mapping[int, str], number: int, total: int) -> Erasure:
        lock = BundleLock.take(self._settings.archive.state_dir, bundle)
        if lock is None:
            raise StorageError(f"bundle {bundle}: another process recovers it; try again")

        def on_step(step: str) -> None:
            self._lock.check()  # who stood still for long does not put an old copy in the place of a newer one
            self._tell(step, number, total)

        try:
            return erase(self._storage, bundle, members.keys(), on_step=on_step)
        finally:
            lock.release()


def _has_bytes(record: MemberRecord) -> bool:
    """Whether another member with the same digest is a copy of it: those without bytes all have the same one."""
    return record.length > record.dataset_offset


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
