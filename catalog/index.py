"""The index: a DuckDB file derived from one version of the Delta tables, shared by the serving processes of a host.

It holds the rows of `patients`, `studies` and `series`, sorted by key, and for `instances` only which files hold which
study and which instance (by a hash of its UID), so that a question about instances opens the few files that matter. A
new version of the tables is a small file beside it as long as few studies change (see sphere.catalog.index_build). All
is a cache: every file is built under a temporary name and renamed into `<state_dir>/index/`, may be deleted at any
time, and is never written again, so that readers and the builder of the next version do not wait for each other. Each
process has the recent arrivals beside it, in memory (see sphere.catalog.recent).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import duckdb

from sphere.catalog import overlay, rows
from sphere.catalog.arrivals import HeadersOfMembers
from sphere.catalog.asof import AsOf, is_settled
from sphere.catalog.conflicts import Conflicts
from sphere.catalog.grant import Grant
from sphere.catalog.index_build import selected
from sphere.catalog.index_files import FileMap
from sphere.catalog.index_folder import PAST, WATCHED, IndexFolder
from sphere.catalog.index_maker import IndexMaker
from sphere.catalog.index_note import attach, note_of, parts_of
from sphere.catalog.index_process import IndexProcess
from sphere.catalog.layers import Index
from sphere.catalog.parts import InstanceFiles
from sphere.catalog.recent import Recent, Sources
from sphere.catalog.tables import CatalogTables
from sphere.catalog.tail import JournalTail
from sphere.catalog.tombstones import open_tombstones
from sphere.conf.errors import CatalogError
from sphere.conf.footprint import settle, unsettle
from sphere.conf.settings import Settings
from sphere.ingest.journal import Landed
from sphere.ingest.spool import open_readable

log = logging.getLogger(__name__)

AT_HAND_S = 600.0
"""Seconds without a query after which an index at hand is looked after."""
SERVE_MEMORY = "512MB"
THREADS = 2
REFRESH_WAIT_S = 0.1
"""Seconds from the start of a refresh for which queries wait for it; later ones answer from the index at hand, which
has as recent arrivals what was catalogued meanwhile."""
SETTLE_S = 5.0
"""Seconds between looks at the tables other than `bundles`: a change that no batch completes is taken up after two."""

ROWS_LOOK_S = 0.1
"""Seconds between looks whether somebody wrote to the mapped rows: one `stat` for each of some twenty files."""
MEND_S = 60.0
"""Seconds after which rows that could not be made are tried again."""

OPEN_ATTEMPTS = 5
RESOLVED_S = 60.0
"""Seconds for which an earlier version is not looked up again in the tables' logs, as that takes longer the more they
keep."""

_DAMAGE = (duckdb.IOException, duckdb.SerializationException, duckdb.InternalException, duckdb.FatalException)


def is_damage(error: duckdb.Error) -> bool:
    """Whether DuckDB says that a file is damaged or gone (a bad checksum is a plain Error)."""
    return isinstance(error, _DAMAGE) or type(error) is duckdb.Error


class IndexCache:
    """Gives the index of the newest catalog version, building it when nobody of this host has. Thread-safe.

    With a `grant`, it is that of the granted instances alone, in a folder of its own. `apart` has indexes made in
    processes of their own, for who answers others meanwhile.
    """

    def __init__(self, settings: Settings, grant: Grant | None = None, *, apart: bool = False) -> None:
        self._settings = settings
        self._tables = CatalogTables(settings)
        self._storage = open_readable(settings)
        self._folder = IndexFolder(settings, grant)
        self._maker: IndexFolder | IndexProcess | IndexMaker = self._folder
        if apart:
            self._maker = IndexMaker(settings) if grant is None else IndexProcess(settings, grant)
        self.tombstones = open_tombstones(settings)
        self._grant = grant
        self._lock = threading.Lock()
        self._index: Index | None = None
        self._looked = 0.0
        self._unsettled: tuple[bool, ...] = ()
        self._away_until = 0.0
        self._suspected = False
        self._instances = InstanceFiles()
        self._past: dict[Path, Index] = {}
        self._past_lock = threading.Lock()
        self._resolved: dict[AsOf, tuple[Path, float, str]] = {}
        self._latest = -1, ""  # version of `bundles` that was the newest one, and what tells its commit from others
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="index")
        self._mender = ThreadPoolExecutor(1, thread_name_prefix="index-rows")
        self._rows_looked = self._mend_at = 0.0
        self._refresh: Future[Index] | None = None
        self._wait_until = 0.0
        self._settled = False

    def current(self) -> Index:
        """The newest index; the one before it while a newer one takes longer than REFRESH_WAIT_S to build, or while
        the tables cannot be read.

        Raises CatalogError when the tables cannot be read and no index is at hand.
        """
        with self._lock:
            self._look_at_rows()
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

    def newest(self) -> int:
        """The version that is complete now, as `at` takes it; raises CatalogError where nothing was extracted yet."""
        version, commit = self._latest
        if version < 0 or self._tables.commit("bundles", version) != commit:
            version = -1
        if version < 0 or self._tables.has_moved("bundles", version):
            version = self._tables.newest("bundles")
            if version < 0:
                raise CatalogError("the catalog has no version as of now: nothing was extracted yet")
            self._latest = version, self._tables.commit("bundles", version)
        return version

    def at(self, as_of: AsOf) -> Index:
        """The index of an earlier version, without recent arrivals and what was deleted since; the last PAST of them
        are kept.

        Raises CatalogError where there is no such version, or its files are gone.
        """
        known, until, seen = self._resolved.get(as_of, (None, 0.0, ""))
        commit = "" if isinstance(as_of, datetime) else self._tables.commit("bundles", as_of)
        with self._past_lock:
            if known is not None and known in self._past and time.monotonic() < until and commit == seen:
                open_one = self._past.pop(known)
                if open_one.rows is None or not open_one.rows.have_changed():
                    self._past[known] = open_one
                    return open_one
        path = self._maker.make(as_of)
        found = iter([path])
        with self._past_lock:
            if is_settled(as_of):
                self._resolved = dict(list(self._resolved.items())[-PAST:])
                self._resolved[as_of] = path, time.monotonic() + RESOLVED_S, commit
            index = self._past.pop(path, None) or self._opened(
                lambda: next(found, None) or self._maker.make(as_of), past=True
            )
            self._past[path] = index
            if index.rows is None:
                with self._lock:
                    self._mend(index.paths[0])
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

    def suspect_rows(self, index: Index) -> bool:
        """Something else than DuckDB failed: let go of the rows beside the index where they are damaged, which is said.

        Reads all of them.
        """
        if index.rows is None or index.rows.are_whole():
            return False
        with self._lock:
            self._drop_rows(index)
        return True

    def close(self) -> None:
        """Let go of the index; a build under way ends first, or is ended where it has a process of its own."""
        self._maker.close()
        self._builder.shutdown()
        self._mender.shutdown()
        self._mend_at = float("inf")
        self._index = None
        self._past.clear()
        self.tombstones.close()
        if self._settled:
            unsettle()

    def _look_at_rows(self) -> None:
        """Let go of rows that somebody wrote to or took away, and have them made anew."""
        index, now = self._index, time.monotonic()
        if index is None or now < self._rows_looked + ROWS_LOOK_S:
            return
        self._rows_looked = now
        if index.rows is None:
            self._mend(index.paths[0])
        elif index.rows.have_changed():
            self._drop_rows(index)

    def _drop_rows(self, index: Index) -> None:
        """Until they are opened anew DuckDB answers. Those of a base that is gone went with it, for a newer one."""
        if index.paths[0].exists():
            log.warning("the rows beside index %s have changed", index.paths[0].name)
        self._past.pop(index.path, None)
        if self._index is not None and self._index.rows is index.rows:
            self._index = replace(self._index, rows=None)
        self._suspected = True

    def _mend(self, base: Path) -> None:
        """Have the rows beside a base made anew in the background; what fails is tried again after MEND_S."""
        if time.monotonic() >= self._mend_at:
            self._mend_at = float("inf")
            self._mender.submit(self._mended, base)

    def _mended(self, base: Path) -> None:
        try:
            self._maker.mend_rows(base)
            with self._lock:
                self._suspected = True
            with self._past_lock:
                self._past.clear()
        except CatalogError as error:
            log.warning("lookups stay slower: %s", error)
        finally:
            self._mend_at = time.monotonic() + MEND_S

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
        with self._lock:
            self._suspected = False  # what is suspected from here on is looked at again
        try:
            index = self._opened(self._newest)
            index.catch_up()
            with self._lock:
                first, self._index = self._index is None, index
                self._looked, self._unsettled = time.monotonic(), ()
                if index.rows is None:
                    self._mend(index.paths[0])
            if first and isinstance(self._maker, IndexMaker):
                settle()
                self._settled = True
            if isinstance(self._maker, IndexMaker) and any(version >= 0 for version in index.versions.values()):
                self._maker.hold()
            return index
        finally:
            with self._lock:
                self._refresh = None

    def _opened(self, find: Callable[[], Path], *, past: bool = False) -> Index:
        """The index that `find` gives, found again where it turns out damaged."""
        for _ in range(OPEN_ATTEMPTS):
            path = find()
            try:
                return self._open(path, past=past)
            except (FileNotFoundError, duckdb.Error):  # damaged, or removed since by the builder of a newer version
                path.unlink(missing_ok=True)
        raise CatalogError(f"no index can be opened in {self._folder.path}: its files vanish or are damaged at once")

    def _newest(self) -> Path:
        """The index of the newest version, made where nobody of this host has."""
        if path := self._folder.newest():
            return path
        if self._maker is self._folder:
            return self._folder.make()
        if not any(self._tables.exists(name) for name in WATCHED):
            return self._folder.make_empty()
        self._folder.wait()
        return self._folder.newest() or self._maker.make()

    def _open(self, path: Path, *, past: bool) -> Index:
        note = note_of(path)
        paths = parts_of(path, note)
        db = self._tables.connect(None, memory_limit=SERVE_MEMORY, threads=THREADS)
        quoted = str(self._folder.path / "spill").replace("'", "''")
        db.execute(f"SET temp_directory = '{quoted}'")
        db.execute("SET parquet_metadata_cache = true")  # footers of 837 columns; within the memory limit
        for name, part in zip(("base", "newer"), paths, strict=False):
            attach(db, part, name)
        db.execute("SELECT count(*) FROM base.study_files").fetchall()
        if self._grant is not None:
            self._grant.attach(db)
        overlay.create(db, "base")
        newer = f"newer.{overlay.SCHEMA}"
        published = overlay.Published(overlay.copy(db, newer) if len(paths) > 1 else overlay.Touched())
        files = FileMap.read(db, ("base", "newer")[: len(paths)])
        columns = frozenset(note.columns)
        recent = self._recent(db, columns, files, published, past=past)
        rows_beside = self._rows_of(paths[0])
        return Index(
            paths, note.versions, db, columns, files, published, recent, rows_beside, self._instances, self._grant
        )

    def _recent(
        self,
        db: duckdb.DuckDBPyConnection,
        columns: frozenset[str],
        files: FileMap,
        published: overlay.Published,
        *,
        past: bool,
    ) -> Recent:
        rows = db.execute(f"SELECT bundle, journal_bytes, sealed FROM {files.sources[-1]}.bundles").fetchall()
        positions = {bundle: size for bundle, size, sealed in rows if not sealed}
        sealed = {row[0] for row in rows if row[2]}
        state_dir = self._settings.archive.state_dir
        sources = Sources(
            None if past else JournalTail(self._storage, state_dir, positions, sealed),
            self.tombstones,
            HeadersOfMembers(self._storage, self._settings.extract.max_header_mib << 20),
            self._settings.ingest.on_conflict,
            Conflicts(self._tables, db, Landed(self._storage, state_dir)).versions,
            columns,
            files,
            self._grant,
        )
        return Recent(db, sources, selected, published)

    def _rows_of(self, base: Path) -> rows.RowStore | None:
        """The rows beside a base, which most often is that of the index before."""
        before = self._index.rows if self._index else None
        return before if before and before.is_of(base) else rows.open_beside(base)
