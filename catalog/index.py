"""The index: a DuckDB file derived from one version of the Delta tables, shared by the serving processes of a host.

It holds the rows of `patients`, `studies` and `series`, sorted by key, and for `instances` only which files hold which
study and which instance (by a hash of its UID), so that a question about instances opens the few files that matter. It
is a cache: every version is built under a temporary name and renamed into `<state_dir>/index/`, may be deleted at any
time, and is never written again, so that readers and the builder of the next version do not wait for each other. Each
process has the recent arrivals beside it, in memory (see sphere.catalog.recent).
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from sphere.catalog.arrivals import HeadersOfMembers
from sphere.catalog.asof import AsOf, snapshots_as_of
from sphere.catalog.conflicts import Conflicts
from sphere.catalog.match import TRAILING_ONLY_VRS, normal_name_sql
from sphere.catalog.recent import FILES_OF_INSTANCES, FILES_OF_STUDIES, Recent, Sources, column_of
from sphere.catalog.schema import BY_KEYWORD, TABLES
from sphere.catalog.tables import CatalogTables, Snapshot
from sphere.catalog.tail import JournalTail
from sphere.conf.errors import CatalogError
from sphere.conf.settings import Settings
from sphere.ingest.journal import Landed
from sphere.ingest.spool import open_readable

log = logging.getLogger(__name__)

FORMAT = 3
"""Raised when the layout of the file changes: files of another format are built anew."""

WATCHED = ("bundles", "instances", "series", "studies", "patients")
"""Tables whose versions an index belongs to, in the order in which they are looked at: the reverse of that in which
extraction commits them (but for `patients` and `studies`, see sphere.catalog.recent), so that whatever `bundles` calls
catalogued is in the others; what these have beyond it counts as a recent arrival."""

INDEXED = ("bundles", "patients", "studies", "series")
MEMORY_LIMIT = "1GB"
THREADS = 2
REFRESH_WAIT_S = 2.0
"""Seconds from the start of a refresh for which queries wait for it; later ones answer from the index at hand."""
SETTLE_S = 5.0
"""Seconds between looks at the tables other than `bundles`: a change that no batch completes is taken up after two."""

OPEN_ATTEMPTS = 5
PAST = 4
"""Indexes of earlier versions that are kept."""

NAME_SUFFIX = "$name"
"""Column `PatientName$name` holds the normalised form of `PatientName`."""

_DAMAGE = (duckdb.IOException, duckdb.SerializationException, duckdb.InternalException, duckdb.FatalException)


def is_damage(error: duckdb.Error) -> bool:
    """Whether DuckDB says that a file is damaged or gone (a bad checksum is a plain Error)."""
    return isinstance(error, _DAMAGE) or type(error) is duckdb.Error


Snapshots = Mapping[str, Snapshot | None]
"""The version of each of the WATCHED tables; None where there is no table."""


@dataclass(frozen=True)
class Index:
    """One version of the catalog, open for reading. Closed by the garbage collector when the last cursor is gone."""

    path: Path
    versions: Mapping[str, int]
    connection: duckdb.DuckDBPyConnection
    instance_columns: frozenset[str]
    recent: Recent | None = None

    @contextmanager
    def cursor(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """A connection of one's own to the same database, for one query of one thread.

        It sees `patients`, `studies` and `series` with the recent arrivals.
        """
        cursor = self.connection.cursor()
        try:
            cursor.execute("USE recent" if self._has_arrivals else "USE base")
            yield cursor
        finally:
            cursor.close()

    @property
    def _has_arrivals(self) -> bool:
        return self.recent is not None and self.recent.members > 0

    def catch_up(self) -> None:
        """Take up what arrived since."""
        if self.recent is not None:
            self.recent.catch_up()

    def instances(self, files: Sequence[str], names: Sequence[str]) -> tuple[str, list[Any]] | None:
        """SQL of a relation with the columns `names` of the instances in `files` and of the recent ones, and its
        values; None where there are neither."""
        read = "read_parquet(?, union_by_name = true)"
        if not self._has_arrivals:
            return (read, [list(files)]) if files else None
        recent = ", ".join(f'{column_of(name)} AS "{name}"' for name in names)
        arrived = f"SELECT {recent} FROM recent.arrivals WHERE shown"
        if not files:
            return f"({arrived})", []
        known = self.instance_columns
        catalogued = ", ".join(f'b."{name}"' if name in known else f'NULL AS "{name}"' for name in names)
        hidden = "ANTI JOIN recent.hidden h ON h.SOPInstanceUID = b.SOPInstanceUID"
        return f"(SELECT {catalogued} FROM {read} b {hidden} UNION ALL {arrived})", [list(files)]

    def is_sound(self) -> bool:
        """Whether the whole file can be read (every block has a checksum). Slow: for when something went wrong."""
        try:
            with self.cursor() as cursor:
                for name in (*INDEXED, "study_files", "sop_files", "files"):
                    cursor.execute(f"SELECT bit_xor(hash(x)) FROM base.{name} x").fetchall()
        except duckdb.Error:
            return False
        return True

    def instance_files(self, study_instance_uids: Sequence[str] | None) -> list[str]:
        """The files of `instances` that hold any of the studies; None: all of them."""
        if study_instance_uids is None:
            return self._files("SELECT file FROM base.files ORDER BY file", [])
        return self._files(FILES_OF_STUDIES, [list(study_instance_uids)])

    def files_of_instances(self, sop_instance_uids: Sequence[str]) -> list[str]:
        """The files that hold any of the instances (rarely one more, as hashes are compared)."""
        return self._files(FILES_OF_INSTANCES, [list(sop_instance_uids)])

    def _files(self, sql: str, values: list[Any]) -> list[str]:
        with self.cursor() as cursor:
            return [row[0] for row in cursor.execute(sql, values).fetchall()]


class IndexCache:
    """Gives the index of the newest catalog version, building it when nobody of this host has. Thread-safe."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._tables = CatalogTables(settings)
        self._storage = open_readable(settings)
        self._folder = settings.archive.state_dir / "index"
        self._lock = threading.Lock()
        self._index: Index | None = None
        self._looked = 0.0
        self._unsettled: tuple[bool, ...] = ()
        self._away_until = 0.0
        self._suspected = False
        self._past: dict[Path, Index] = {}
        self._past_lock = threading.Lock()
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="index")
        self._refresh: Future[Index] | None = None
        self._wait_until = 0.0

    def current(self) -> Index:
        """The newest index; the one before it while a newer one takes longer than REFRESH_WAIT_S to build, or while
        the tables cannot be read.

        Raises CatalogError when the tables cannot be read and no index is at hand.
        """
        with self._lock:
            index = self._index
            if index is not None and not self._is_stale(index):
                return index
            if self._refresh is None:
                self._refresh = self._builder.submit(self._load)
                self._wait_until = time.monotonic() + REFRESH_WAIT_S
            refresh, wait = self._refresh, max(0.0, self._wait_until - time.monotonic())
        if index is None:
            return refresh.result()
        try:
            return refresh.result(wait)
        except FutureTimeout:
            return index
        except CatalogError as error:
            log.warning("answering from the index at hand: %s", error)
            return index

    def at(self, as_of: AsOf) -> Index:
        """The index of an earlier version, without recent arrivals; the last PAST of them are kept.

        Raises CatalogError where there is no such version, or its files are gone.
        """
        snapshots = snapshots_as_of(self._tables, WATCHED, as_of)
        path = self._path(snapshots, past=True)
        with self._past_lock:
            index = self._past.pop(path, None) or self._opened(lambda: snapshots, past=True)
            self._past[path] = index
            while len(self._past) > PAST:
                del self._past[next(iter(self._past))]
            return index

    def suspect(self, index: Index) -> None:
        """Something could not be read: delete the index where it is damaged, and look for a newer version in any case,
        as data files that are gone were replaced by one."""
        sound = index.is_sound()
        with self._lock:
            self._suspected = True
            if not sound:
                log.warning("index %s is damaged: building it anew", index.path.name)
                index.path.unlink(missing_ok=True)
                self._past.pop(index.path, None)
                self._index = None if self._index is index else self._index

    def close(self) -> None:
        """Let go of the index; a build under way ends first."""
        self._builder.shutdown()
        self._index = None
        self._past.clear()

    def _is_stale(self, index: Index) -> bool:
        """Extraction commits `bundles` last: its next version means a complete batch."""
        now = time.monotonic()
        try:
            if self._suspected:
                return True
            if now >= self._away_until and self._tables.has_moved("bundles", index.versions["bundles"]):
                return True
            if now - self._looked < SETTLE_S:
                return False
            self._looked = now
            moved = tuple(self._tables.has_moved(name, index.versions[name]) for name in WATCHED)
        except CatalogError as error:
            log.warning("answering from the index at hand: %s", error)
            self._looked, self._away_until = now, now + SETTLE_S
            return False
        settled, self._unsettled = moved == self._unsettled, moved
        return any(moved) and settled

    def _load(self) -> Index:
        try:
            index = self._open_or_build()
            index.catch_up()
            with self._lock:
                self._index, self._looked, self._unsettled = index, time.monotonic(), ()
            return index
        finally:
            with self._lock:
                self._refresh, self._suspected = None, False

    def _open_or_build(self) -> Index:
        return self._opened(lambda: {name: self._tables.snapshot(name) for name in WATCHED})

    def _opened(self, look: Callable[[], Snapshots], *, past: bool = False) -> Index:
        """The index of the versions that `look` gives, built where it is not there or damaged."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for _ in range(OPEN_ATTEMPTS):
            snapshots = look()
            path = self._path(snapshots, past=past)
            if not path.exists():
                with _flock(self._folder / "build.lock"):
                    if not path.exists():
                        self._build(path, snapshots)
                        self._remove_past() if past else self._remove_others(path)
            try:
                return self._open(path, snapshots, past=past)
            except (FileNotFoundError, duckdb.Error):  # damaged, or removed since by the builder of a newer version
                path.unlink(missing_ok=True)
        raise CatalogError(f"no index can be opened in {self._folder}: its files vanish or are damaged at once")

    def _remove_past(self) -> None:
        """Keep the PAST files of earlier versions that were made last."""
        files = sorted(self._folder.glob(f"past-{self._prefix()}*.duckdb"), key=lambda path: path.stat().st_mtime)
        for path in files[:-PAST]:
            path.unlink(missing_ok=True)

    def _path(self, snapshots: Snapshots, *, past: bool) -> Path:
        """One name per catalog root and its versions; the table ids tell a catalog from its successor at that place."""
        parts = [str(FORMAT), duckdb.__version__, self._tables.root]  # hashes are those of one version of DuckDB
        parts += [f"{s.table_id}@{s.version}" if s else "none" for s in snapshots.values()]
        digest = hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]
        return self._folder / f"{'past-' if past else ''}{self._prefix()}{digest}.duckdb"

    def _prefix(self) -> str:
        return f"catalog-{hashlib.sha256(self._tables.root.encode()).hexdigest()[:8]}-"

    def _remove_others(self, path: Path) -> None:
        """Delete files of other versions; a process that has one open keeps reading it."""
        for other in self._folder.glob(f"{self._prefix()}*"):
            if other != path and not other.is_dir():
                other.unlink(missing_ok=True)

    def _open(self, path: Path, snapshots: Snapshots, *, past: bool) -> Index:
        if not path.exists():
            raise FileNotFoundError(path)
        connection = self._tables.connect(None, memory_limit=MEMORY_LIMIT, threads=THREADS)
        quoted = str(path).replace("'", "''")
        connection.execute(f"ATTACH '{quoted}' AS base (READ_ONLY)")
        connection.execute("SELECT count(*) FROM base.study_files").fetchall()
        instances = snapshots["instances"]
        versions = {name: snapshot.version if snapshot else -1 for name, snapshot in snapshots.items()}
        columns = instances.columns if instances else frozenset(TABLES["instances"].schema.names)
        return Index(path, versions, connection, columns, None if past else self._recent(connection, columns))

    def _recent(self, connection: duckdb.DuckDBPyConnection, columns: frozenset[str]) -> Recent:
        rows = connection.execute("SELECT bundle, journal_bytes, sealed FROM base.bundles").fetchall()
        positions = {bundle: size for bundle, size, sealed in rows if not sealed}
        sealed = {row[0] for row in rows if row[2]}
        state_dir = self._settings.archive.state_dir
        sources = Sources(
            JournalTail(self._storage, state_dir, positions, sealed),
            HeadersOfMembers(self._storage, self._settings.extract.max_header_mib << 20),
            self._settings.ingest.on_conflict,
            Conflicts(self._tables, connection, Landed(self._storage, state_dir)).versions,
            columns,
        )
        return Recent(connection, sources, _selected)

    def _build(self, path: Path, snapshots: Snapshots) -> None:
        began = time.monotonic()
        building = path.with_suffix(f".{os.getpid()}.building")
        building.unlink(missing_ok=True)
        connection = self._tables.connect(building, memory_limit=MEMORY_LIMIT, threads=THREADS)
        try:
            for name in INDEXED:
                _copy_table(connection, name, snapshots[name])
            _map_files(connection, snapshots["instances"])
        except duckdb.Error as error:
            raise CatalogError(f"no index can be built from {self._tables.root}: {error}") from None
        finally:
            connection.close()
        building.rename(path)
        log.info("index %s built in %.2f s", path.name, time.monotonic() - began)


def _copy_table(connection: duckdb.DuckDBPyConnection, name: str, snapshot: Snapshot | None) -> None:
    table = TABLES[name]
    if snapshot is None or not snapshot.files:
        connection.register("empty", table.schema.empty_table())
        source, columns, values = "empty", frozenset(table.schema.names), []
    else:
        source, columns, values = "read_parquet(?, union_by_name = true)", snapshot.columns, [list(snapshot.files)]
    selected = ", ".join(_selected(column) for column in table.schema.names if column in columns)
    missing = "".join(f', NULL AS "{column}"' for column in table.schema.names if column not in columns)
    order = ", ".join(f'"{key}"' for key in table.key)
    connection.execute(f"CREATE TABLE {name} AS SELECT {selected}{missing} FROM {source} ORDER BY {order}", values)


def _selected(name: str) -> str:
    """A column for the index: text without insignificant spaces, empty text as null, names normalised beside."""
    column = BY_KEYWORD.get(name)
    if column is None or str(column.arrow) not in ("string", "list<item: string>") or column.vr == "UI":
        return f'"{name}"'
    trimmed = trimmed_sql(f'"{name}"', column.vr, multiple=column.multiple)
    if column.vr != "PN" or column.multiple:
        return f'{trimmed} AS "{name}"'
    return f'{trimmed} AS "{name}", {normal_name_sql(trimmed)} AS "{name}{NAME_SUFFIX}"'


def trimmed_sql(x: str, vr: str, *, multiple: bool) -> str:
    """Text (or a list of it) in column form: without insignificant spaces, null where nothing is left."""
    trim = "rtrim" if vr in TRAILING_ONLY_VRS else "trim"
    if multiple:
        return f"list_transform({x}, lambda v: {trim}(v))"
    return f"nullif({trim}({x}), '')"


def _map_files(connection: duckdb.DuckDBPyConnection, snapshot: Snapshot | None) -> None:
    """Which files of `instances` hold which study, and which instance: Delta's statistics cut UIDs at 32 characters."""
    connection.execute("CREATE TABLE study_files (StudyInstanceUID VARCHAR, file VARCHAR)")
    connection.execute("CREATE TABLE files (id INTEGER, file VARCHAR)")
    connection.execute("CREATE TABLE sop_files (hash UBIGINT, id INTEGER)")
    if snapshot is None or not snapshot.files:
        return
    connection.execute(
        "INSERT INTO study_files SELECT DISTINCT StudyInstanceUID, filename "
        "FROM read_parquet(?, filename = true) ORDER BY ALL",
        [list(snapshot.files)],
    )
    connection.execute("INSERT INTO files SELECT row_number() OVER (), unnest(?)", [list(snapshot.files)])
    connection.execute(
        "INSERT INTO sop_files SELECT hash(i.SOPInstanceUID) AS hash, f.id "
        "FROM read_parquet(?, filename = true) i JOIN files f ON f.file = i.filename ORDER BY hash",
        [list(snapshot.files)],
    )


@contextmanager
def _flock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock file: one process of the host builds, the others wait for its result."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
