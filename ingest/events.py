"""Events: what people did to an archive, one JSON line each, durable below a folder of the storage.

Each process appends to a file of its own, a new one each day, so that nobody waits for anybody; all the files together
are the truth. What they say is kept ready in a SQLite file of this host, shared by its processes: a cache, which may be
deleted at any time and is read anew from the files. See docs/decisions/0025-annotations.md.
"""

from __future__ import annotations

import hashlib
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Final

import orjson

from sphere.conf.errors import StorageError
from sphere.conf.private import make_private
from sphere.ingest.dayfile import DayFile
from sphere.ingest.storage.base import Entry, Storage

log = logging.getLogger(__name__)

Apply = Callable[[sqlite3.Connection, Mapping[str, Any]], None]

DAYS: Final = 60
"""Days up to which the folders of the days are looked at one by one, and not all of them."""
CHUNK: Final = 4 << 20
"""Bytes of a file read at a time; a line is far shorter."""
BUSY_S: Final = 30.0
"""Seconds to wait for another process that takes events up."""
_DDL = """
CREATE TABLE IF NOT EXISTS event_files (path TEXT PRIMARY KEY, bytes INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS event_days (day TEXT NOT NULL);
"""


class EventLog:
    """The events below `folder`; `apply` puts one into tables that `ddl` makes, in any order and once. Thread-safe."""

    def __init__(self, storage: Storage, state_dir: Path, folder: str, *, ddl: str, apply: Apply) -> None:
        self._storage, self._folder, self._apply = storage, folder, apply
        self._ddl = _DDL + ddl
        name = hashlib.sha256(f"{storage.url}|{self._ddl}".encode()).hexdigest()[:16]
        self._cache = state_dir / "events" / f"{folder.replace('/', '-')}-{name}.sqlite"
        self._db: sqlite3.Connection | None = None
        self._lock = threading.RLock()  # of the connection
        self._writing = threading.Lock()
        self._file = DayFile(storage, folder)
        self._seen: dict[str, int] = {}  # bytes of the files, as far as they are known to be taken up
        self._looked_until: date | None = None
        self._looked = 0.0

    def close(self) -> None:
        """Let go of the file of this process, and of the cache."""
        with self._writing:
            self._file.close()
        with self._lock:
            if self._db is not None:
                self._db.close()
                self._db = None

    def is_unused(self) -> bool:
        """Whether there was never an event, as far as is told without a cache: this host has none, and no file."""
        return not self._cache.exists() and next(self._storage.walk(self._folder), None) is None

    def append(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Return when the events are durable, and readable by every process of every host; raises StorageError."""
        lines = [orjson.dumps(event, option=orjson.OPT_APPEND_NEWLINE) for event in events]
        with self._writing:
            try:
                appender = self._file.open(datetime.now(timezone.utc))
                appender.write(lines)
                appender.publish()
            except StorageError:
                self._file.abandon()
                raise
        with self.reading():
            return

    @contextmanager
    def reading(self, *, max_age_s: float = 0.0) -> Iterator[sqlite3.Connection]:
        """The cache, with every event that was published at most `max_age_s` ago; raises StorageError."""
        with self._lock:
            db = self._connected()
            if time.monotonic() - self._looked >= max_age_s:
                self._take_up(db)
            yield db

    def _connected(self) -> sqlite3.Connection:
        """The cache; one that is damaged is made anew."""
        if self._db is None:
            make_private(self._cache.parent)
            try:
                self._db = self._open()
            except sqlite3.DatabaseError:
                log.warning("%s is damaged: made anew", self._cache.name)
                for path in self._cache.parent.glob(f"{self._cache.name}*"):
                    path.unlink(missing_ok=True)
                self._db = self._open()
            self._seen, self._looked_until = {}, None
        return self._db

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._cache, timeout=BUSY_S, check_same_thread=False, isolation_level=None)
        try:
            db.row_factory = sqlite3.Row
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")  # a cache: what a crash of the host costs is read again
            db.executescript(self._ddl)
        except sqlite3.DatabaseError:
            db.close()
            raise
        return db

    def _take_up(self, db: sqlite3.Connection) -> None:
        today = datetime.now(timezone.utc).date()
        grown = [entry for entry in self._entries(db, today) if entry.size != self._seen.get(entry.path)]
        if grown or self._looked_until != today:
            db.execute("BEGIN IMMEDIATE")
            try:
                for entry in grown:
                    self._read(db, entry.path)
                db.execute("DELETE FROM event_days")
                db.execute("INSERT INTO event_days VALUES (?)", (today.isoformat(),))
                db.execute("COMMIT")
            except BaseException:
                db.execute("ROLLBACK")
                raise
            self._seen |= {entry.path: entry.size for entry in grown}
            self._looked_until = today
        self._looked = time.monotonic()

    def _entries(self, db: sqlite3.Connection, today: date) -> Iterator[Entry]:
        """The files that may have grown: of the days since somebody of this host looked, and the one before."""
        since = self._looked_until
        if since is None:
            row = db.execute("SELECT min(day) FROM event_days").fetchone()
            since = date.fromisoformat(row[0]) if row[0] else None
        if since is None or (today - since).days > DAYS:
            yield from self._storage.walk(self._folder)
            return
        day = since - timedelta(days=1)
        while day <= today:
            yield from self._storage.walk(f"{self._folder}/{day:%Y/%m/%d}")
            day += timedelta(days=1)

    def _read(self, db: sqlite3.Connection, path: str) -> None:
        """Take up the complete lines that nobody of this host has."""
        row = db.execute("SELECT bytes FROM event_files WHERE path = ?", (path,)).fetchone()
        position = row[0] if row else 0
        while end := (data := self._storage.read(path, position, CHUNK)).rfind(b"\n") + 1:
            for line in data[:end].splitlines():
                try:
                    self._apply(db, orjson.loads(line))
                except (orjson.JSONDecodeError, KeyError, TypeError) as error:
                    log.error("an event in %s cannot be read: %s", path, type(error).__name__)
            position += end
        db.execute("INSERT OR REPLACE INTO event_files VALUES (?, ?)", (path, position))
