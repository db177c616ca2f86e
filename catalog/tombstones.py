"""Tombstones: which instances were deleted, so that nobody is shown them; their bytes stay until compaction.

Compaction says of them that they are erased before it takes the first byte, and from then on they cannot be restored.

A deletion and its undoing are events below ``tombstones/`` of the storage (see sphere.ingest.events), durable and seen
by every process of every host when they return; of an instance the latest counts. Extraction carries them out in the
tables, see docs/decisions/0031-tombstones.md.
"""

from __future__ import annotations

import os
import sqlite3
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from itertools import groupby
from math import inf
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import orjson

from sphere.catalog.lock import FateLock
from sphere.conf.errors import BytesGone, StorageError
from sphere.conf.settings import Settings
from sphere.ingest.events import EventLog
from sphere.ingest.storage import open_storage
from sphere.ingest.storage.base import Storage
from sphere.ingest.storage.local import LocalStorage

FOLDER: Final = "tombstones"
LOOK_S: Final = 1.0
"""Seconds between looks at the events. On local disk the time of the folder tells of a change as well, and is looked at
each time; elsewhere who makes a change waits as long before it is called done."""
EVENT: Final = 1000  # instances of one event: its line is far shorter than what is read at a time
PAGE: Final = 20_000  # changes given at once
_TICK = timedelta(microseconds=1)

Stamp = tuple[int, int]
Action = Literal["deleted", "restored", "erased"]
_STATES: Final[Mapping[Action, int]] = {"restored": 0, "deleted": 1, "erased": 2}


class Named(Protocol):
    """What names an instance: a row of `instances`, say."""

    @property
    def StudyInstanceUID(self) -> str: ...
    @property
    def SeriesInstanceUID(self) -> str: ...
    @property
    def SOPInstanceUID(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Tombstone:
    """The latest that was done to an instance: whether it is deleted, when (RFC 3339, UTC), by whom, and why.

    That it is `erased` changes nothing of these.
    """

    StudyInstanceUID: str
    SeriesInstanceUID: str
    SOPInstanceUID: str
    deleted: bool
    at: str
    by: str
    reason: str
    erased: bool = False


_DDL = """
CREATE TABLE IF NOT EXISTS instances (
  SOPInstanceUID TEXT PRIMARY KEY, StudyInstanceUID TEXT NOT NULL, SeriesInstanceUID TEXT NOT NULL,
  deleted INTEGER NOT NULL, at TEXT NOT NULL, id TEXT NOT NULL, since TEXT NOT NULL, by TEXT NOT NULL,
  reason TEXT NOT NULL,
  seq INTEGER NOT NULL) WITHOUT ROWID;
CREATE UNIQUE INDEX IF NOT EXISTS by_seq ON instances (seq);
CREATE INDEX IF NOT EXISTS by_study ON instances (StudyInstanceUID) WHERE deleted;
CREATE INDEX IF NOT EXISTS by_series ON instances (SeriesInstanceUID) WHERE deleted;
CREATE TABLE IF NOT EXISTS made (one INTEGER PRIMARY KEY, name TEXT NOT NULL);
INSERT OR IGNORE INTO made VALUES (1, lower(hex(randomblob(8))));
CREATE TABLE IF NOT EXISTS told (table_id TEXT PRIMARY KEY, cursor TEXT NOT NULL);
"""
_NAMES = "StudyInstanceUID, SeriesInstanceUID, SOPInstanceUID, deleted, since, by, reason"
_LATER = """
INSERT INTO instances VALUES (:sop, :study, :series, :deleted, :at, :id, :since, :by, :reason,
  (SELECT coalesce(max(seq), 0) + 1 FROM instances))
ON CONFLICT DO UPDATE SET StudyInstanceUID = excluded.StudyInstanceUID, SeriesInstanceUID = excluded.SeriesInstanceUID,
  deleted = excluded.deleted, at = excluded.at, id = excluded.id, since = excluded.since, by = excluded.by,
  reason = excluded.reason, seq = CASE WHEN excluded.deleted = 2 AND deleted THEN seq ELSE excluded.seq END
WHERE (excluded.at, excluded.id) > (at, id)
"""
_AMONG = "IN (SELECT value FROM json_each(?))"


def _apply(db: sqlite3.Connection, event: Mapping[str, Any]) -> None:
    action: Action = event["action"]
    said = {name: event[name] for name in ("at", "id", "by", "reason")}
    said |= {"since": event.get("since", event["at"]), "deleted": _STATES[action]}
    said |= {"study": event["StudyInstanceUID"], "series": event["SeriesInstanceUID"]}
    db.executemany(_LATER, [{**said, "sop": uid} for uid in event["SOPInstanceUIDs"]])


class Tombstones:
    """The tombstones of an archive. One per process, shared by its threads; nothing is opened before it is needed."""

    def __init__(self, storage: Storage, state_dir: Path) -> None:
        self._storage = storage
        self._log = EventLog(storage, state_dir, FOLDER, ddl=_DDL, apply=_apply)
        self._folder = str(storage.root / FOLDER) if isinstance(storage, LocalStorage) else None
        self._any = False
        self._seen: Stamp | None = None  # as of which the cache has every event
        self._settled: tuple[str, Stamp] | None = None  # a cursor after which nothing had come then
        self._state: tuple[Stamp | None, str] = None, ""

    def close(self) -> None:
        """Let go of what was opened."""
        self._log.close()

    def delete(self, instances: Iterable[Named], *, by: str, reason: str = "") -> int:
        """Show these instances no more; how many were shown before. Raises StorageError.

        When it returns, it is durable and no process of any host shows them. Those of one call are deleted in pieces
        of EVENT: a crash may leave it at some of them.
        """
        known = {one.SOPInstanceUID: one for one in instances}
        gone = self.deleted(list(known))
        new = [one for uid, one in known.items() if uid not in gone]
        return self._tell("deleted", new, by=by, reason=reason)

    def restore(self, sop_instance_uids: Sequence[str], *, by: str, reason: str = "") -> int:
        """Undo the deletion of these instances; how many were deleted.

        Raises BytesGone, and restores none, where some are erased; LockHeld where another process restores or erases
        for long; StorageError.
        """
        if not sop_instance_uids or not any(True for _ in self.find(sop=sop_instance_uids)):
            return 0
        with self._deciding("undelete") as lock:
            buried = list(self.find(sop=sop_instance_uids))
            _refuse_erased(buried)
            lock.check()
            done = self._tell("restored", buried, by=by, reason=reason)
        _refuse_erased(self.find(sop=sop_instance_uids))  # the lock was lost, and who has it was faster
        return done

    def erase(self, sop_instance_uids: Sequence[str], *, until: datetime) -> set[str]:
        """Say that the bytes of these go: of those that are deleted, and were by `until`; returns which are erased by
        now. Their bytes may go then, and cannot come back. Raises LockHeld where another process restores or erases for
        long, and StorageError.
        """
        with self._deciding("compact") as lock:
            latest = until.isoformat(timespec="microseconds")
            found = self.find(sop=sop_instance_uids)
            going = [one for one in found if not one.erased and one.at <= latest]
            lock.check()
            self._tell("erased", going)
        return {one.SOPInstanceUID for one in self.find(sop=sop_instance_uids) if one.erased}

    @contextmanager
    def _deciding(self, job: str) -> Iterator[FateLock]:
        """Nobody else restores or erases meanwhile, and what was done until now is known."""
        with FateLock(self._storage, job=job) as lock:
            self._seen = self._settled = None
            yield lock
            lock.check()  # what was said may have been said too late: it is not acted upon
            self._seen = self._settled = None

    def deleted(self, sop_instance_uids: Sequence[str]) -> set[str]:
        """Those of the UIDs that are deleted. Raises StorageError."""
        if (stamp := self._stamp()) is None:
            return set()
        sql = f"SELECT SOPInstanceUID FROM instances WHERE deleted AND SOPInstanceUID {_AMONG}"
        with self._reading(stamp) as db:
            return {row[0] for row in db.execute(sql, (_json(sop_instance_uids),))}

    def find(
        self, *, study: Sequence[str] = (), series: Sequence[str] = (), sop: Sequence[str] = ()
    ) -> Iterator[Tombstone]:
        """The tombstones of deleted instances in the order of UIDs. Given several, all must hold; given none, every
        one. Raises StorageError."""
        if (stamp := self._stamp()) is None:
            return
        wanted = {"StudyInstanceUID": study, "SeriesInstanceUID": series, "SOPInstanceUID": sop}
        named = {name: _json(uids) for name, uids in wanted.items() if uids}
        where = " AND ".join(["deleted", "SOPInstanceUID > ?", *(f"{name} {_AMONG}" for name in named)])
        sql = f"SELECT {_NAMES} FROM instances WHERE {where} ORDER BY SOPInstanceUID LIMIT {PAGE}"
        last = ""
        while True:
            with self._reading(stamp) as db:
                page = [_tombstone(row) for row in db.execute(sql, (last, *named.values()))]
            yield from page
            if len(page) < PAGE:
                return
            last = page[-1].SOPInstanceUID

    def named(self, uids: Collection[str]) -> tuple[set[str], set[str]]:
        """Those of the UIDs that are of a deleted instance, and those of a study or series that had one. Raises
        StorageError."""
        if not uids or (stamp := self._stamp()) is None:
            return set(), set()
        named = ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
        sql = [f"SELECT DISTINCT {name} FROM instances WHERE deleted AND {name} {_AMONG}" for name in named]
        with self._reading(stamp) as db:
            instances, *others = [{row[0] for row in db.execute(one, (_json(list(uids)),))} for one in sql]
        return instances, set().union(*others)

    def count(self) -> int:
        """How many instances are deleted. Raises StorageError."""
        if (stamp := self._stamp()) is None:
            return 0
        with self._reading(stamp) as db:
            return int(db.execute("SELECT count(*) FROM instances WHERE deleted").fetchone()[0])

    def changes(self, after: str = "") -> tuple[list[Tombstone], str]:
        """(up to PAGE instances that changed since the cursor `after`, each as it is now, a cursor to go on from).

        "" is before everything. A cursor is of this host: one of another gives everything, as does one from before the
        cache of this host was made anew. Nothing is left when the list is empty. Raises StorageError.
        """
        stamp = self._stamp()
        if stamp is None or self._settled == (after, stamp):
            return [], after
        with self._reading(stamp) as db:
            (made,) = db.execute("SELECT name FROM made").fetchone()
            name, _, number = after.partition(":")
            since = int(number) if name == made else 0
            sql = f"SELECT {_NAMES}, seq FROM instances WHERE seq > ? ORDER BY seq LIMIT {PAGE}"
            rows = db.execute(sql, (since,)).fetchall()
        if not rows:
            self._settled = f"{made}:{since}", stamp
        return [_tombstone(row) for row in rows], f"{made}:{rows[-1]['seq'] if rows else since}"

    def told(self, table_id: str) -> str:
        """The cursor up to which this host has told the table of that id; "" at first. Raises StorageError."""
        if (stamp := self._stamp()) is None:
            return ""
        with self._reading(stamp) as db:
            row = db.execute("SELECT cursor FROM told WHERE table_id = ?", (table_id,)).fetchone()
        return str(row[0]) if row else ""

    def tell(self, table_id: str, cursor: str) -> None:
        """Remember that a table was told up to a cursor that `changes` gave. Raises StorageError."""
        with self._log.reading(max_age_s=inf) as db:
            db.execute("INSERT OR REPLACE INTO told VALUES (?, ?)", (table_id, cursor))

    def state(self) -> str:
        """A text that is another one after every change; "" before the first. Raises StorageError."""
        stamp = self._stamp()
        if stamp is None or self._state[0] == stamp:
            return self._state[1] if stamp else ""
        sql = "SELECT name || ':' || (SELECT coalesce(max(seq), 0) FROM instances) FROM made"
        with self._reading(stamp) as db:
            self._state = stamp, db.execute(sql).fetchone()[0]
        return self._state[1]

    def _stamp(self) -> Stamp | None:
        """What is another one after every change; None where nothing was ever deleted, which costs no more than a look
        at whether there is a folder."""
        now = int(time.monotonic() / LOOK_S)
        if self._folder is not None:
            try:
                return os.stat(self._folder).st_mtime_ns, now  # noqa: PTH116  asked for each query and each arrival
            except FileNotFoundError:
                return None
            except OSError as error:
                raise StorageError(f"{self._folder} cannot be looked at: {error.strerror}") from None
        if not self._any and self._seen != (0, now):
            self._any = next(iter(self._storage.walk(FOLDER)), None) is not None
            self._seen = None if self._any else (0, now)
        return (0, now) if self._any else None

    @contextmanager
    def _reading(self, stamp: Stamp) -> Iterator[sqlite3.Connection]:
        """The cache, with what had happened when `stamp` was taken."""
        with self._log.reading(max_age_s=inf if self._seen == stamp else 0.0) as db:
            self._seen = stamp
            yield db

    def _tell(self, action: Action, instances: Sequence[Named], *, by: str = "", reason: str = "") -> int:
        """What was said when they were deleted stays said of those that are erased."""
        if not instances:
            return 0
        at = self._moment([one.SOPInstanceUID for one in instances]).isoformat(timespec="microseconds")

        def said(one: Named) -> tuple[str, str, dict[str, str]]:
            told = {"by": by, "reason": reason}
            if action == "erased" and isinstance(one, Tombstone):
                told = {"since": one.at, "by": one.by, "reason": one.reason}
            return one.StudyInstanceUID, one.SeriesInstanceUID, told

        events = []
        for (study, series, told), group in groupby(sorted(instances, key=_uids), key=said):
            sops = [one.SOPInstanceUID for one in group]
            for start in range(0, len(sops), EVENT):
                named = {"StudyInstanceUID": study, "SeriesInstanceUID": series}
                event = {"id": uuid.uuid4().hex, "action": action, "at": at, **told}
                events.append({**event, **named, "SOPInstanceUIDs": sops[start : start + EVENT]})
        self._log.append(events)
        self._spread()
        return len(instances)

    def _spread(self) -> None:
        """Return when no process answers any more from what it saw before."""
        if self._folder is not None:
            now = time.time_ns()
            with suppress(OSError):  # the folder is another user's
                os.utime(self._folder, ns=(now, now))
                return
        time.sleep(LOOK_S)

    def _moment(self, uids: Sequence[str]) -> datetime:
        """Now, and after all that is known to have been done to these: clocks of hosts differ."""
        now = datetime.now(timezone.utc)
        if (stamp := self._stamp()) is None:
            return now
        with self._reading(stamp) as db:
            sql = f"SELECT max(at) FROM instances WHERE SOPInstanceUID {_AMONG}"
            (last,) = db.execute(sql, (_json(uids),)).fetchone()
        return max(now, datetime.fromisoformat(last) + _TICK) if last else now


def open_tombstones(settings: Settings) -> Tombstones:
    """Those of the archive of `settings`; connects when it is first used."""
    return Tombstones(open_storage(settings.storage.root, user=settings.storage.user), settings.archive.state_dir)


def _json(uids: Sequence[str]) -> str:
    """For `json_each`, which takes any number of them as one value."""
    return orjson.dumps(list(uids)).decode()


def _uids(one: Named) -> tuple[str, str, str]:
    return one.StudyInstanceUID, one.SeriesInstanceUID, one.SOPInstanceUID


def _tombstone(row: sqlite3.Row) -> Tombstone:
    study, series, sop, state, since, by, reason = tuple(row)[:7]
    return Tombstone(study, series, sop, state != 0, since, by, reason, erased=state == _STATES["erased"])


def _refuse_erased(found: Iterable[Tombstone]) -> None:
    gone = [one.SOPInstanceUID for one in found if one.erased]
    if gone:
        raise BytesGone(
            f"the bytes of {len(gone)} of these instances are gone since compaction, as of {gone[0]}: "
            "they cannot be shown again"
        )
