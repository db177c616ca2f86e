"""The indexes of a catalog on this host: which is the newest, and making one where there is none.

Files are made under a temporary name and renamed, by one process of the host at a time. See sphere.catalog.index.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path

import duckdb
import pyarrow as pa

from sphere.catalog import rows
from sphere.catalog.asof import AsOf, snapshots_as_of
from sphere.catalog.grant import Grant
from sphere.catalog.index_base import AttachedBase
from sphere.catalog.index_build import RebuildNeeded, build_base, build_refresh, rehearse
from sphere.catalog.index_note import Snapshots, attach, note_of, parts_of
from sphere.catalog.tables import CatalogTables
from sphere.conf.alone import alone
from sphere.conf.errors import CatalogError
from sphere.conf.private import make_private
from sphere.conf.settings import Settings

log = logging.getLogger(__name__)

FORMAT = 6
"""Raised when the layout of the file changes: files of another format are built anew."""

WATCHED = ("bundles", "instances", "series", "studies", "patients")
"""Tables whose versions an index belongs to, in the order in which they are looked at: the reverse of that in which
extraction commits them (but for `patients` and `studies`, see sphere.catalog.recent), so that whatever `bundles` calls
catalogued is in the others; what these have beyond it counts as a recent arrival."""

BUILD_MEMORY = "1GB"
THREADS = 2
PAST = 4
"""Indexes of earlier versions that are kept."""


class IndexFolder:
    """The files in `<state_dir>/index/`; with a `grant` those of the granted instances, in a folder of its own.

    `keep` is for who makes one refresh after the other: the base stays attached.
    """

    def __init__(self, settings: Settings, grant: Grant | None = None, *, keep: bool = False) -> None:
        self._tables = CatalogTables(settings)
        self._grant, self._keep = grant, keep
        self._attached = AttachedBase(self._tables, memory_limit=BUILD_MEMORY, threads=THREADS)
        self.path = settings.archive.state_dir / "index"
        if grant is not None:
            self.path /= f"of-{grant.digest}"

    def newest(self) -> Path | None:
        """The index that was made last, where the tables have not moved since. Reads no table.

        Raises CatalogError where the storage does not answer.
        """
        made = self._made()
        try:
            return made[-1] if made and note_of(made[-1]).is_newest(self._tables) else None
        except (OSError, duckdb.Error):  # damaged, or removed since by the builder of a newer version
            return None

    def wait(self) -> None:
        """Return when nobody makes one."""
        with self._alone():
            return

    def make(self, as_of: AsOf | None = None, *, small: bool = False) -> Path:
        """The index of the newest version, or of an earlier one, made where it is not there.

        Raises CatalogError; where it is to be a `small` file beside another one, and cannot be, RebuildNeeded.
        """
        if as_of is None:
            snapshots: Snapshots = {name: self._tables.snapshot(name) for name in WATCHED}
        else:
            snapshots = snapshots_as_of(self._tables, WATCHED, as_of)
        return self._made_of(snapshots, past=as_of is not None, small=small)

    def make_empty(self) -> Path:
        """The index of a catalog that has no tables, made where it is not there. Raises CatalogError."""
        return self._made_of(dict.fromkeys(WATCHED))

    def rehearse(self) -> None:
        """Load what a refresh needs. Raises CatalogError."""
        snapshots: Snapshots = {name: self._tables.snapshot(name) for name in WATCHED}
        try:
            if made := self._made():
                with self._beside(parts_of(made[-1], note_of(made[-1]))[0], None) as (db, found):
                    rehearse(db, snapshots["instances"], found)
        except (duckdb.Error, OSError) as error:
            raise CatalogError(f"index {made[-1].name} cannot be read: {type(error).__name__}") from None

    def mend_rows(self, base: Path) -> None:
        """Make the rows beside a base anew, where they are not what was written. Raises CatalogError."""
        with self._alone():
            if not base.exists() or rows.are_beside(base):
                return
            began, making = time.monotonic(), rows.folder_of(base.with_suffix(f".{os.getpid()}.building"))
            try:
                with self._beside(base, None) as (db, _):
                    rows.build(db, making, base="base")
                _put(making, rows.folder_of(base))
            except (duckdb.Error, pa.ArrowException, OSError) as error:
                shutil.rmtree(making, ignore_errors=True)
                raise CatalogError(f"the rows beside index {base.name} cannot be made: {error}") from None
            log.info("rows beside index %s made anew in %.2f s", base.name, time.monotonic() - began)

    def close(self) -> None:
        """Let go of what is kept."""
        self._attached.forget()

    def _made(self) -> list[Path]:
        """Indexes that were the newest once, the last one last."""
        found = [(path, _modified(path)) for path in self.path.glob(f"{self._prefix()}*.duckdb")]
        return [path for path, _ in sorted(found, key=lambda one: one[1])]

    def _made_of(self, snapshots: Snapshots, *, past: bool = False, small: bool = False) -> Path:
        """The index of some versions."""
        path = self._path(snapshots, past=past)
        if not path.exists():
            with self._alone():
                if not path.exists():
                    self._make(path, snapshots, past=past, small=small)
        return path

    def _path(self, snapshots: Snapshots, *, past: bool) -> Path:
        """One name per catalog root and its versions; the table ids tell a catalog from its successor at that place."""
        parts = [f"{s.table_id}@{s.version}" if s else "none" for s in snapshots.values()]
        return self.path / f"{'past-' if past else ''}{self._prefix()}{_digest(*parts)}.duckdb"

    def _prefix(self) -> str:
        """Of the files of this catalog, in a form that we can read: hashes are those of one version of DuckDB."""
        return f"catalog-{_digest(self._tables.root)[:8]}-{_digest(str(FORMAT), duckdb.__version__)[:4]}-"

    def _make(self, path: Path, snapshots: Snapshots, *, past: bool, small: bool) -> None:
        """A refresh of the index that was made last, where that will do, else a new base."""
        try:
            base = self._refresh_of_last(path, snapshots)
        except RebuildNeeded as reason:
            if small:
                raise
            log.info("index %s: made from nothing, as %s", path.name, reason)
            self._build(path, snapshots)
            base = path
        if past:
            self._remove_past()
        else:
            self._remove_others({path, base})

    def _refresh_of_last(self, path: Path, snapshots: Snapshots) -> Path:
        """Make a refresh; returns its base. Raises RebuildNeeded."""
        made = self._made()
        if not made:
            raise RebuildNeeded("there is none")
        try:
            base, *newer = parts_of(made[-1], note_of(made[-1]))
            self._refresh(path, snapshots, base=base, since=newer[0] if newer else None)
        except (duckdb.Error, CatalogError, OSError) as error:
            log.warning("index %s cannot be gone on from: %s", made[-1].name, type(error).__name__)
            raise RebuildNeeded("the one before is damaged") from None
        return base

    def _build(self, path: Path, snapshots: Snapshots) -> None:
        """Make a base; raises CatalogError."""
        with self._making(path, "built") as making:
            with closing(self._tables.connect(making, memory_limit=BUILD_MEMORY, threads=THREADS)) as db:
                if self._grant is not None:
                    self._grant.attach(db)
                build_base(db, snapshots, grant=self._grant)
                rows.build(db, rows.folder_of(making))
            _put(rows.folder_of(making), rows.folder_of(path))

    def _refresh(self, path: Path, snapshots: Snapshots, *, base: Path, since: Path | None) -> None:
        """Make a refresh of `base` that goes on from another one; raises RebuildNeeded and CatalogError."""
        with self._making(path, "refreshed") as making, self._beside(base, making) as (db, found):
            if self._grant is not None:
                self._grant.attach(db)
            if since:
                attach(db, since, "since")
            build_refresh(db, snapshots, since="since" if since else None, base=base.name, rows=found,
                          grant=self._grant)  # fmt: skip
            if since:
                db.execute("DETACH since")

    @contextmanager
    def _beside(
        self, base: Path, making: Path | None
    ) -> Iterator[tuple[duckdb.DuckDBPyConnection, rows.RowStore | None]]:
        """As of AttachedBase, which is kept for the next one, or not."""
        try:
            with self._attached.beside(base, making) as found:
                yield found
        finally:
            if not self._keep:
                self._attached.forget()

    @contextmanager
    def _making(self, path: Path, done: str) -> Iterator[Path]:
        """The name of a file that is to become `path`; raises CatalogError for what goes wrong."""
        began = time.monotonic()
        making = path.with_suffix(f".{os.getpid()}.building")
        making.unlink(missing_ok=True)
        try:
            yield making
            making.rename(path)
        except (duckdb.Error, pa.ArrowException, OSError) as error:
            raise CatalogError(f"no index can be built from {self._tables.root}: {error}") from None
        log.info("index %s %s in %.2f s", path.name, done, time.monotonic() - began)

    def _remove_past(self) -> None:
        """Keep the PAST files of earlier versions that were made last."""
        files = sorted(self.path.glob(f"past-{self._prefix()}*.duckdb"), key=lambda path: path.stat().st_mtime)
        for path in files[:-PAST]:
            path.unlink(missing_ok=True)
            shutil.rmtree(rows.folder_of(path), ignore_errors=True)

    def _remove_others(self, kept: set[Path]) -> None:
        """Delete files of other versions, the rows after their base: a process that has them open keeps reading it, and
        takes rows that went alone for damaged."""
        stays = kept | {rows.folder_of(path) for path in kept}
        others = [one for one in self.path.glob(f"catalog-{_digest(self._tables.root)[:8]}-*") if one not in stays]
        for other in others:
            if not other.is_dir():
                other.unlink(missing_ok=True)
        for other in others:
            if other.suffix == rows.SUFFIX:
                shutil.rmtree(other, ignore_errors=True)

    def _alone(self) -> AbstractContextManager[None]:
        """One process of the host builds, the others wait for its result."""
        make_private(self.path)
        return alone(self.path / "build.lock")


def _put(folder: Path, place: Path) -> None:
    """Rename a folder to `place`, whatever is there. Raises OSError."""
    shutil.rmtree(place, ignore_errors=True)
    if place.is_symlink() or place.is_file():
        place.unlink()
    folder.rename(place)


def _modified(path: Path) -> int:
    """When a file was written, in ns since 1970; 0 where it is gone."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _digest(*parts: str) -> str:
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]
