"""The index: a DuckDB file derived from one version of the Delta tables, shared by the serving processes of a host.

It holds the rows of `patients`, `studies` and `series`, sorted by key, and for `instances` only which files hold which
study and which instance (by a hash of its UID), so that a question about instances opens the few files that matter. A
new version of the tables is a small file beside it as long as few studies change (see sphere.catalog.index_build). All
is a cache: every file is built under a temporary name and renamed into `<state_dir>/index/`, may be deleted at any
time, and is never written again, so that readers and the builder of the next version do not wait for each other. Each
process has the recent arrivals beside it, in memory (see sphere.catalog.recent).
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from pathlib import Path

import duckdb
import orjson
import pyarrow as pa

from sphere.catalog import overlay, rows
from sphere.catalog.arrivals import HeadersOfMembers
from sphere.catalog.asof import AsOf, is_settled, snapshots_as_of
from sphere.catalog.conflicts import Conflicts
from sphere.catalog.grant import Grant
from sphere.catalog.index_build import RebuildNeeded, Snapshots, build_base, build_refresh, selected
from sphere.catalog.index_files import FileMap
from sphere.catalog.layers import Index
from sphere.catalog.parts import InstanceFiles
from sphere.catalog.recent import Recent, Sources
from sphere.catalog.schema import TABLES
from sphere.catalog.tables import CatalogTables
from sphere.catalog.tail import JournalTail
from sphere.conf.errors import CatalogError
from sphere.conf.settings import Settings
from sphere.ingest.journal import Landed
from sphere.ingest.spool import open_readable

log = logging.getLogger(__name__)

AT_HAND_S = 600.0
"""Seconds without a query after which an index at hand is looked after."""
FORMAT = 5
"""Raised when the layout of the file changes: files of another format are built anew."""

WATCHED = ("bundles", "instances", "series", "studies", "patients")
"""Tables whose versions an index belongs to, in the order in which they are looked at: the reverse of that in which
extraction commits them (but for `patients` and `studies`, see sphere.catalog.recent), so that whatever `bundles` calls
catalogued is in the others; what these have beyond it counts as a recent arrival."""

BUILD_MEMORY, SERVE_MEMORY = "1GB", "512MB"
THREADS = 2
REFRESH_WAIT_S = 0.1
"""Seconds from the start of a refresh for which queries wait for it; later ones answer from the index at hand, which
has as recent arrivals what was catalogued meanwhile."""
SETTLE_S = 5.0
"""Seconds between looks at the tables other than `bundles`: a change that no batch completes is taken up after two."""

OPEN_ATTEMPTS = 5
PAST = 4
"""Indexes of earlier versions that are kept."""
RESOLVED_S = 60.0
"""Seconds for which an earlier version is not looked up again in the tables' logs, as that takes longer the more they
keep."""

_DAMAGE = (duckdb.IOException, duckdb.SerializationException, duckdb.InternalException, duckdb.FatalException)


def is_damage(error: duckdb.Error) -> bool:
    """Whether DuckDB says that a file is damaged or gone (a bad checksum is a plain Error)."""
    return isinstance(error, _DAMAGE) or type(error) is duckdb.Error


class IndexCache:
    """Gives the index of the newest catalog version, building it when nobody of this host has. Thread-safe.

    With a `grant`, it is that of the granted instances alone, in a folder of its own.
    """

    def __init__(self, settings: Settings, grant: Grant | None = None) -> None:
        self._settings = settings
        self._tables = CatalogTables(settings)
        self._storage = open_readable(settings)
        self._folder = settings.archive.state_dir / "index"
        self._grant = grant
        if grant is not None:
            self._folder /= f"of-{grant.digest}"
        self._lock = threading.Lock()
        self._index: Index | None = None
        self._looked = 0.0
        self._unsettled: tuple[bool, ...] = ()
        self._away_until = 0.0
        self._suspected = False
        self._instances = InstanceFiles()
        self._past: dict[Path, Index] = {}
        self._past_lock = threading.Lock()
        self._resolved: dict[AsOf, tuple[Path, float]] = {}
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

    def at_hand(self, *, load: bool) -> Index | None:
        """The index that was opened last, without waiting, or None.

        With `load` a first one is opened in the background, and one that nobody asked a query for AT_HAND_S is looked
        after.
        """
        with self._lock:
            old = self._index is None or time.monotonic() - self._looked > AT_HAND_S
            if load and old and self._refresh is None and (self._index is None or self._is_stale(self._index)):
                self._refresh = self._builder.submit(self._load)
            return self._index

    def at(self, as_of: AsOf) -> Index:
        """The index of an earlier version, without recent arrivals; the last PAST of them are kept.

        Raises CatalogError where there is no such version, or its files are gone.
        """
        known, until = self._resolved.get(as_of, (None, 0.0))
        with self._past_lock:
            if known is not None and known in self._past and time.monotonic() < until:
                self._past[known] = self._past.pop(known)
                return self._past[known]
        snapshots = snapshots_as_of(self._tables, WATCHED, as_of)
        path = self._path(snapshots, past=True)
        with self._past_lock:
            if is_settled(as_of):
                self._resolved = dict(list(self._resolved.items())[-PAST:])
                self._resolved[as_of] = path, time.monotonic() + RESOLVED_S
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
                for path in index.paths:
                    path.unlink(missing_ok=True)
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
                        self._make(path, snapshots, past=past)
            try:
                return self._open(path, snapshots, past=past)
            except (FileNotFoundError, duckdb.Error):  # damaged, or removed since by the builder of a newer version
                path.unlink(missing_ok=True)
        raise CatalogError(f"no index can be opened in {self._folder}: its files vanish or are damaged at once")

    def _path(self, snapshots: Snapshots, *, past: bool) -> Path:
        """One name per catalog root and its versions; the table ids tell a catalog from its successor at that place."""
        parts = [f"{s.table_id}@{s.version}" if s else "none" for s in snapshots.values()]
        return self._folder / f"{'past-' if past else ''}{self._prefix()}{_digest(*parts)}.duckdb"

    def _prefix(self) -> str:
        """Of the files of this catalog, in a form that we can read: hashes are those of one version of DuckDB."""
        return f"catalog-{_digest(self._tables.root)[:8]}-{_digest(str(FORMAT), duckdb.__version__)[:4]}-"

    def _make(self, path: Path, snapshots: Snapshots, *, past: bool) -> None:
        """A refresh of the index that was made last, where that will do, else a new base."""
        try:
            base = self._refresh_of_last(path, snapshots)
        except RebuildNeeded as reason:
            log.info("index %s: made from nothing, as %s", path.name, reason)
            self._build(path, snapshots)
            base = path
        if past:
            self._remove_past()
        else:
            self._remove_others({path, base})

    def _refresh_of_last(self, path: Path, snapshots: Snapshots) -> Path:
        """Make a refresh; returns its base. Raises RebuildNeeded."""
        made = sorted(self._folder.glob(f"{self._prefix()}*.duckdb"), key=lambda one: one.stat().st_mtime_ns)
        if not made:
            raise RebuildNeeded("there is none")
        try:
            base, *newer = _parts(made[-1])
            self._build(path, snapshots, base=base, since=newer[0] if newer else None)
        except (duckdb.Error, CatalogError, OSError) as error:
            log.warning("index %s cannot be gone on from: %s", made[-1].name, type(error).__name__)
            raise RebuildNeeded("the one before is damaged") from None
        return base

    def _build(self, path: Path, snapshots: Snapshots, *, base: Path | None = None, since: Path | None = None) -> None:
        began = time.monotonic()
        building = path.with_suffix(f".{os.getpid()}.building")
        building.unlink(missing_ok=True)
        db = self._tables.connect(building, memory_limit=BUILD_MEMORY, threads=THREADS)
        try:
            if self._grant is not None:
                self._grant.attach(db)
            if base is None:
                build_base(db, snapshots, grant=self._grant)
                rows.build(db, rows.folder_of(building))
            else:
                _attach(db, base, "base")
                if since:
                    _attach(db, since, "since")
                build_refresh(db, snapshots, since="since" if since else None, base=base.name, grant=self._grant)
        except (duckdb.Error, pa.ArrowException, OSError) as error:
            raise CatalogError(f"no index can be built from {self._tables.root}: {error}") from None
        finally:
            db.close()
        if base is None:
            shutil.rmtree(rows.folder_of(path), ignore_errors=True)
            rows.folder_of(building).rename(rows.folder_of(path))
        building.rename(path)
        log.info("index %s %s in %.2f s", path.name, "refreshed" if base else "built", time.monotonic() - began)

    def _remove_past(self) -> None:
        """Keep the PAST files of earlier versions that were made last."""
        files = sorted(self._folder.glob(f"past-{self._prefix()}*.duckdb"), key=lambda path: path.stat().st_mtime)
        for path in files[:-PAST]:
            path.unlink(missing_ok=True)
            shutil.rmtree(rows.folder_of(path), ignore_errors=True)

    def _remove_others(self, kept: set[Path]) -> None:
        """Delete files of other versions; a process that has one open keeps reading it."""
        stays = kept | {rows.folder_of(path) for path in kept}
        for other in self._folder.glob(f"catalog-{_digest(self._tables.root)[:8]}-*"):
            if other not in stays and other.suffix == rows.SUFFIX:
                shutil.rmtree(other, ignore_errors=True)
            elif other not in stays and not other.is_dir():
                other.unlink(missing_ok=True)

    def _open(self, path: Path, snapshots: Snapshots, *, past: bool) -> Index:
        paths = _parts(path)
        db = self._tables.connect(None, memory_limit=SERVE_MEMORY, threads=THREADS)
        quoted = str(self._folder / "spill").replace("'", "''")
        db.execute(f"SET temp_directory = '{quoted}'")
        db.execute("SET parquet_metadata_cache = true")  # footers of 837 columns; within the memory limit
        for name, part in zip(("base", "newer"), paths, strict=False):
            _attach(db, part, name)
        db.execute("SELECT count(*) FROM base.study_files").fetchall()
        if self._grant is not None:
            self._grant.attach(db)
        overlay.create(db, "base")
        newer = f"newer.{overlay.SCHEMA}"
        published = overlay.Published(overlay.copy(db, newer) if len(paths) > 1 else overlay.Touched())
        files = FileMap.read(db, ("base", "newer")[: len(paths)])
        instances = snapshots["instances"]
        versions = {name: snapshot.version if snapshot else -1 for name, snapshot in snapshots.items()}
        columns = instances.columns if instances else frozenset(TABLES["instances"].schema.names)
        recent = None if past else self._recent(db, columns, files, published)
        return Index(
            paths, versions, db, columns, files, published, recent, _rows_of(paths[0]), self._instances, self._grant
        )

    def _recent(
        self, db: duckdb.DuckDBPyConnection, columns: frozenset[str], files: FileMap, published: overlay.Published
    ) -> Recent:
        rows = db.execute(f"SELECT bundle, journal_bytes, sealed FROM {files.sources[-1]}.bundles").fetchall()
        positions = {bundle: size for bundle, size, sealed in rows if not sealed}
        sealed = {row[0] for row in rows if row[2]}
        state_dir = self._settings.archive.state_dir
        sources = Sources(
            JournalTail(self._storage, state_dir, positions, sealed),
            HeadersOfMembers(self._storage, self._settings.extract.max_header_mib << 20),
            self._settings.ingest.on_conflict,
            Conflicts(self._tables, db, Landed(self._storage, state_dir)).versions,
            columns,
            files,
            self._grant,
        )
        return Recent(db, sources, selected, published)


def _rows_of(base: Path) -> rows.RowStore | None:
    try:
        return rows.RowStore(base)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        log.warning("index %s has no rows beside it, lookups are slower: %s", base.name, type(error).__name__)
        return None


def _attach(db: duckdb.DuckDBPyConnection, path: Path, name: str) -> None:
    if not path.exists():
        raise FileNotFoundError(path)
    quoted = str(path).replace("'", "''")
    db.execute(f"ATTACH '{quoted}' AS {name} (READ_ONLY)")


def _parts(path: Path) -> tuple[Path, ...]:
    """The files that an index consists of: a base, or a base and the refresh at `path`."""
    with duckdb.connect() as db:
        _attach(db, path, "made")
        note = orjson.loads(db.execute("SELECT note FROM made.made").fetchall()[0][0])
    return (path.with_name(note["base"]), path) if note["base"] else (path,)


def _digest(*parts: str) -> str:
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]


@contextmanager
def _flock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock file: one process of the host builds, the others wait for its result."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
