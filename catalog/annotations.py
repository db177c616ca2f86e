"""Annotations: files of any type, linked to a study, a series or an instance, with all their versions.

A version is a file below ``annotations/files/`` and a line of the event journals below ``annotations/journal/``, which
are the truth. The file's name is the annotation's id and the number of the version: who gives a file that name first
has made that version, on every storage and from every host. A deletion is a version without bytes. See
docs/decisions/0025-annotations.md.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import sqlite3
import time
import uuid
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from typing import Any, Final, Literal, Protocol

import orjson

from sphere.catalog.schema import UNIQUE_KEY, Level
from sphere.conf.errors import BadRequest, BundleDamaged, NotThere, Overtaken, StorageError, TooLarge
from sphere.conf.settings import Settings
from sphere.ingest.events import EventLog
from sphere.ingest.storage import open_storage
from sphere.ingest.storage.base import Storage
from sphere.ingest.storage.paths import TEMPORARY

log = logging.getLogger(__name__)

FOLDER: Final = "annotations"
FILES: Final = f"{FOLDER}/files"
JOURNAL: Final = f"{FOLDER}/journal"
PIECE: Final = 1 << 20  # bytes read and handed on at once
CLAIM_S: Final = 60.0  # seconds after which a version that was begun and never told of is passed over
MAX_TEXT: Final = 1000  # characters of a description
MAX_NAME: Final = 200  # characters of any other text

Action = Literal["put", "delete"]
State = Literal["current", "superseded", "deleted"]
TARGETS: Final[tuple[Level, ...]] = ("STUDY", "SERIES", "IMAGE")


@dataclass(frozen=True, slots=True)
class Target:
    """What an annotation is of; UIDs above its level are "" where the archive does not know them."""

    level: Level
    StudyInstanceUID: str = ""
    SeriesInstanceUID: str = ""
    SOPInstanceUID: str = ""

    @property
    def uid(self) -> str:
        """That of its own level."""
        return str(getattr(self, UNIQUE_KEY[self.level]))

    @classmethod
    def unknown(cls, level: Level, uid: str) -> Target:
        """Something that is not in the archive (yet)."""
        return cls(level, **{UNIQUE_KEY[level]: uid})


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One version of an annotation: what is said of it, and where its bytes are.

    `at` is RFC 3339 in UTC, `size` in bytes, `sha256` hexadecimal; `author` is whom the annotation is by, `made_by` who
    sent this version. `name` is what its maker calls the file: never part of a path.
    """

    id: str
    version: int
    action: Action
    level: Level
    StudyInstanceUID: str
    SeriesInstanceUID: str
    SOPInstanceUID: str
    type: str
    author: str
    name: str
    media_type: str
    description: str
    size: int
    sha256: str
    path: str
    at: str
    made_by: str


@dataclass(frozen=True, slots=True)
class About:
    """What the maker of a version says of it; None: as the version before."""

    type: str | None = None
    author: str | None = None
    name: str | None = None
    media_type: str | None = None
    description: str | None = None


COLUMNS: Final = tuple(field.name for field in fields(Version))
_INTEGERS = ("version", "size")
_DDL = f"""
CREATE TABLE IF NOT EXISTS versions (
  {", ".join(f'"{name}" {"INTEGER" if name in _INTEGERS else "TEXT"} NOT NULL' for name in COLUMNS)},
  newest INTEGER NOT NULL, seq INTEGER NOT NULL, PRIMARY KEY (id, version));
CREATE INDEX IF NOT EXISTS of_study ON versions (StudyInstanceUID) WHERE newest;
CREATE INDEX IF NOT EXISTS of_series ON versions (SeriesInstanceUID) WHERE newest;
CREATE INDEX IF NOT EXISTS of_instance ON versions (SOPInstanceUID) WHERE newest;
CREATE INDEX IF NOT EXISTS by_time ON versions (at, id) WHERE newest;
CREATE INDEX IF NOT EXISTS by_seq ON versions (seq);
CREATE TABLE IF NOT EXISTS told (table_id TEXT PRIMARY KEY, seq INTEGER NOT NULL);
"""
_NAMES = ", ".join(f'"{name}"' for name in COLUMNS)
_INSERT = (
    f"INSERT OR IGNORE INTO versions ({_NAMES}, newest, seq) VALUES ({', '.join(f':{name}' for name in COLUMNS)}, 0, "
    "(SELECT coalesce(max(seq), 0) + 1 FROM versions))"
)
_NEWEST = "UPDATE versions SET newest = (version = (SELECT max(version) FROM versions WHERE id = :id)) WHERE id = :id"


_OWN: Final[Mapping[Level, str]] = {level: UNIQUE_KEY[level] for level in TARGETS}
_WHEN = " ".join(f"WHEN '{level}' THEN {name}" for level, name in _OWN.items())
_TARGET_UID = f"CASE level {_WHEN} END"


def _where(uid: str, level: Level | None, type: str, author: str) -> tuple[str, list[str]]:
    """A condition on `versions`, and its values."""
    where, values = ["newest", "action = 'put'"], []
    if uid:
        found = " UNION ".join(f"SELECT id FROM versions WHERE newest AND {name} = ?" for name in _OWN.values())
        where.append(f"id IN ({found})")
        values += [uid] * len(_OWN)
    for name, value in (("level", level), ("type", type), ("author", author)):
        if value:
            where.append(f'"{name}" = ?')
            values.append(value)
    return " AND ".join(where), values


def _apply(db: sqlite3.Connection, event: Mapping[str, Any]) -> None:
    row = {name: event[name] for name in COLUMNS}
    db.execute(_INSERT, row)
    db.execute(_NEWEST, row)


class Locates(Protocol):
    """What the query service does for us."""

    def lookup_instances(
        self, *, study: Sequence[str] = (), series: Sequence[str] = (), sop: Sequence[str] = ()
    ) -> Iterator[Any]:
        """Instances with these UIDs."""


def locate(catalog: Locates, uid: str, level: Level | None) -> Target | None:
    """What a UID names in the archive, at any level or at the one given; None where nothing has it.

    Raises CatalogError.
    """
    for one in (level,) if level else TARGETS:
        found = {"STUDY": "study", "SERIES": "series", "IMAGE": "sop"}[one]
        instance = next(iter(catalog.lookup_instances(**{found: [uid]})), None)
        if instance is not None:
            below = TARGETS.index(one)
            names = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")[: below + 1]
            return Target(one, **{name: getattr(instance, name) for name in names})
    return None


class Annotations:
    """The annotations of an archive. One per process, shared by its threads."""

    def __init__(self, settings: Settings) -> None:
        self._storage = open_storage(settings.storage.root, user=settings.storage.user)
        self._log = EventLog(self._storage, settings.archive.state_dir, JOURNAL, ddl=_DDL, apply=_apply)
        self.limit = settings.annotations.limit_mib << 20
        """Bytes of a file."""

    def close(self) -> None:
        """Let go of what was opened."""
        self._log.close()

    def find(
        self,
        *,
        uid: str = "",
        level: Level | None = None,
        type: str = "",
        author: str = "",
        without: Collection[str] = (),
        limit: int = -1,
        offset: int = 0,
    ) -> tuple[list[Version], int]:
        """(newest versions in the order of time, how many there are without `limit` and `offset`) of what was not
        deleted.

        `uid` is that of a study, series or instance: what is linked to it or to something in it. What is linked to one
        of the UIDs `without` itself is left out. Raises StorageError.
        """
        condition, values = _where(uid, level, type, author)
        if without:
            condition += f" AND {_TARGET_UID} NOT IN (SELECT value FROM json_each(?))"
            values.append(orjson.dumps(list(without)).decode())
        with self._log.reading() as db:
            (total,) = db.execute(f"SELECT count(*) FROM versions WHERE {condition}", values).fetchone()
            sql = f"SELECT {_NAMES} FROM versions WHERE {condition} ORDER BY at, id LIMIT ? OFFSET ?"
            rows = db.execute(sql, [*values, limit, offset]).fetchall()
        return [Version(**row) for row in rows], total

    def targets(self, *, uid: str = "", level: Level | None = None, type: str = "", author: str = "") -> set[str]:
        """The UIDs that what `find` gives is linked to, each of its level. Raises StorageError."""
        condition, values = _where(uid, level, type, author)
        with self._log.reading() as db:
            rows = db.execute(f"SELECT DISTINCT {_TARGET_UID} FROM versions WHERE {condition}", values).fetchall()
        return {row[0] for row in rows}

    def linked(self, uids: Collection[str]) -> int:
        """How many there are that were not deleted, linked to one of these UIDs itself. Raises StorageError."""
        among = "IN (SELECT value FROM json_each(:uids))"
        found = " UNION ".join(
            f"SELECT id FROM versions WHERE newest AND action = 'put' AND level = '{level}' AND {name} {among}"
            for level, name in _OWN.items()
        )
        with self._log.reading() as db:
            given = {"uids": orjson.dumps(list(uids)).decode()}
            return int(db.execute(f"SELECT count(*) FROM ({found})", given).fetchone()[0])

    def history(self, id: str) -> list[Version]:
        """Every version, the newest first; raises NotThere, and StorageError."""
        with self._log.reading() as db:
            rows = db.execute(f"SELECT {_NAMES} FROM versions WHERE id = ? ORDER BY version DESC", (id,)).fetchall()
        if not rows:
            raise NotThere(f"there is no annotation {id[:40]!r}")
        return [Version(**row) for row in rows]

    def version(self, id: str, number: int | None = None) -> Version:
        """The version of that number, by default the newest; raises NotThere where there is none, or where it is a
        deletion."""
        found = [one for one in self.history(id) if number in (None, one.version)]
        if not found or found[0].action == "delete":
            what = f"no version {number}" if number and not found else "been deleted; its history names its versions"
            raise NotThere(f"annotation {id} has {what}")
        return found[0]

    def begin(self, about: About, *, made_by: str) -> Draft:
        """A file for a new annotation, to be written and committed to its target; raises StorageError."""
        return Draft(self._storage, self._log, self.limit, uuid.uuid4().hex, 1, about, made_by)

    def begin_version(self, id: str, about: About, *, made_by: str, onto: int | None = None) -> Draft:
        """A file for a new version; raises NotThere, and Overtaken where the newest is not the one numbered `onto`."""
        newest = self._newest(id, onto)
        return Draft(self._storage, self._log, self.limit, id, self._next(newest), about, made_by, newest)

    def delete(self, id: str, *, made_by: str, onto: int | None = None) -> Version:
        """Show an annotation no more; its versions stay. Raises NotThere, Overtaken, and StorageError."""
        newest = self._newest(id, onto)
        draft = Draft(self._storage, self._log, self.limit, id, self._next(newest), About(), made_by, newest)
        return draft.commit(action="delete")

    def read(self, version: Version, part: tuple[int, int] | None = None) -> Generator[bytes, None, None]:
        """Its bytes in pieces; the last comes only when digest and size of all are as recorded.

        Of a `part` (begin and end) it is the size alone that is looked at. Raises StorageError, BundleDamaged where
        they are not.
        """
        if self._storage.size(version.path) != version.size:
            raise BundleDamaged(f"{version.path} does not have the {version.size} bytes that were recorded")
        return self._pieces(version) if part is None else self._part(version, *part)

    def is_unused(self) -> bool:
        """Whether nobody ever annotated anything, as far as is told at once."""
        return self._log.is_unused()

    def after(self, seq: int) -> tuple[list[tuple[Version, State]], int]:
        """(versions with their states, a number to go on from) of all annotations that changed since this host's
        number `seq`, 0 for all."""
        with self._log.reading() as db:
            (last,) = db.execute("SELECT coalesce(max(seq), 0) FROM versions").fetchone()
            changed = "SELECT id FROM versions WHERE seq > ?"
            sql = f"SELECT {_NAMES}, newest FROM versions WHERE id IN ({changed}) ORDER BY id, version"
            rows = [dict(row) for row in db.execute(sql, (seq,)).fetchall()]
        states: list[tuple[Version, State]] = []
        for row in rows:
            newest = row.pop("newest")
            version = Version(**row)
            states.append((version, "deleted" if version.action == "delete" else "current" if newest else "superseded"))
        return states, last

    def told(self, table_id: str) -> int:
        """The number up to which this host has told the table of that id; 0 at first."""
        with self._log.reading() as db:
            row = db.execute("SELECT seq FROM told WHERE table_id = ?", (table_id,)).fetchone()
        return int(row[0]) if row else 0

    def tell(self, table_id: str, seq: int) -> None:
        """Remember that a table was told up to a number that `after` gave."""
        with self._log.reading() as db:
            db.execute("INSERT OR REPLACE INTO told VALUES (?, ?)", (table_id, seq))

    def _pieces(self, version: Version) -> Generator[bytes, None, None]:
        sha, held = hashlib.sha256(), b""
        for at in range(0, version.size, PIECE):
            data = self._storage.read(version.path, at, min(PIECE, version.size - at))
            sha.update(data)
            if held:
                yield held
            held = data
        if sha.hexdigest() != version.sha256:
            raise BundleDamaged(f"{version.path} does not have the digest that was recorded")
        if held:
            yield held

    def _part(self, version: Version, start: int, end: int) -> Generator[bytes, None, None]:
        for at in range(start, end, PIECE):
            data = self._storage.read(version.path, at, min(PIECE, end - at))
            if len(data) != min(PIECE, end - at):
                raise BundleDamaged(f"{version.path} ends before its {version.size} bytes")
            yield data

    def _newest(self, id: str, onto: int | None) -> Version:
        newest = self.history(id)[0]
        if newest.action == "delete":
            raise NotThere(f"annotation {id} has been deleted")
        if onto is not None:
            _replaces(newest, onto)
        return newest

    def _next(self, newest: Version) -> int:
        """The number after it; those are passed over whose file is old and that no journal tells of: their maker died
        in between, or was told of a failure."""
        number = newest.version + 1
        if not self._storage.exists(file_path(newest.id, number)):
            return number
        folder = file_path(newest.id, number).rpartition("/")[0]
        made = {entry.path: entry.mtime for entry in self._storage.walk(folder)}
        while (at := made.get(file_path(newest.id, number))) is not None:
            if time.time() - at < CLAIM_S:
                raise Overtaken(f"another version of annotation {newest.id} is being made; look again, then try again")
            number += 1
        return number


class Draft:
    """A version that is being written. Nothing of it is to be seen before `commit`; not for two threads at once."""

    def __init__(
        self,
        storage: Storage,
        events: EventLog,
        limit: int,
        id: str,
        number: int,
        about: About,
        made_by: str,
        before: Version | None = None,
    ) -> None:
        self.id, self.about = id, about
        self._storage, self._events, self._limit = storage, events, limit
        self._number, self._made_by, self._before = number, made_by, before
        self._path = file_path(id, number)
        folder, _, name = self._path.rpartition("/")
        self._temporary = f"{folder}/.{name}.{secrets.token_hex(4)}{TEMPORARY}"
        self._appender = storage.create(self._temporary)
        self._sha, self._size, self._open = hashlib.sha256(), 0, True

    def write(self, data: bytes | memoryview) -> None:
        """More of the file; raises TooLarge, and StorageError."""
        self._size += len(data)
        if self._size > self._limit:
            raise TooLarge(f"a file has at most {self._limit >> 20} MiB (annotations.limit_mib)")
        if len(data):
            self._sha.update(data)
            self._appender.write([data])

    def expect(self, onto: int | None) -> None:
        """Go on only if this was the newest version when the draft was begun (None: any); raises Overtaken."""
        if self._before is not None and onto is not None:
            _replaces(self._before, onto)

    def commit(self, target: Target | None = None, *, action: Action = "put", sha256: str = "") -> Version:
        """Make the version durable, then known; a first one needs its target.

        Raises BadRequest where the digest is not `sha256` (hexadecimal; "": any), Overtaken where another process made
        the version of this number first, StorageError.
        """
        digest = self._sha.hexdigest()
        if sha256 and sha256.lower() != digest:
            raise BadRequest(f"the file that came has the digest {digest}, not the sha256 that was given")
        version = self._version(target, action, digest)
        self._appender.close()
        try:
            self._storage.rename(self._temporary, self._path)
        except StorageError:
            if self._storage.exists(self._path) and self._storage.exists(self._temporary):  # so it is another's
                raise Overtaken(f"another version {self._number} of annotation {self.id} was made meanwhile") from None
            raise
        self._open = False
        self._events.append([asdict(version)])
        return version

    def discard(self) -> None:
        """Leave nothing behind of what was not committed."""
        if self._open:
            self._open = False
            self._appender.abandon()
            with suppress(StorageError):
                self._storage.delete(self._temporary)

    def _version(self, target: Target | None, action: Action, digest: str) -> Version:
        before = self._before
        if target is None:
            assert before is not None
            target = Target(before.level, before.StudyInstanceUID, before.SeriesInstanceUID, before.SOPInstanceUID)
        said = asdict(self.about)
        for name, default in (("type", ""), ("author", self._made_by), ("name", ""), ("description", "")):
            if said[name] is None:
                said[name] = getattr(before, name) if before else default
        if said["media_type"] is None:
            said["media_type"] = before.media_type if before and action == "delete" else "application/octet-stream"
        said["name"] = file_name(said["name"]) or self.id
        return Version(
            id=self.id, version=self._number, action=action, **asdict(target), **said, size=self._size, sha256=digest,
            path=self._path, at=datetime.now(timezone.utc).isoformat(timespec="milliseconds"), made_by=self._made_by,
        )  # fmt: skip


def _replaces(newest: Version, onto: int) -> None:
    """Raises Overtaken where the newest version is not the one that is to be replaced."""
    if onto != newest.version:
        raise Overtaken(f"annotation {newest.id} is at version {newest.version}, not {onto}")


def file_path(id: str, number: int) -> str:
    """Where the bytes of a version are, below the root of the storage."""
    return f"{FILES}/{id[:2]}/{id}-{number:04}"


def file_name(text: str) -> str:
    """What a client calls a file, without folders, control characters and all that could lead elsewhere."""
    last = text.replace("\\", "/").rpartition("/")[2]
    return "".join(one for one in last if one.isprintable())[:MAX_NAME].strip(". ")


def plain_text(name: str, value: str, *, limit: int = MAX_NAME) -> str:
    """A text that somebody gave, checked; raises BadRequest."""
    if len(value) > limit:
        raise BadRequest(f"{name} has at most {limit} characters")
    if not all(one.isprintable() or (one in "\n\t" and limit > MAX_NAME) for one in value):
        raise BadRequest(f"{name} has characters that cannot be shown")
    return value


def level_named(text: str) -> Level | None:
    """The level that a client names, None for ""; raises BadRequest."""
    level = text.upper()
    if level == "INSTANCE":
        level = "IMAGE"
    for known in TARGETS:
        if level == known:
            return known
    if level:
        raise BadRequest("level is study, series or instance")
    return None
