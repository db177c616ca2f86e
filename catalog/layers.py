"""An index open for reading, and the two layers that a query is put to: its file, and the rows beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import duckdb

from sphere.catalog import overlay
from sphere.catalog.grant import Grant
from sphere.catalog.index_build import INDEXED
from sphere.catalog.index_files import FileMap
from sphere.catalog.overlay import Touched
from sphere.catalog.parts import InstanceFiles
from sphere.catalog.reading import instances_sql
from sphere.catalog.recent import Recent, column_of
from sphere.catalog.rows import RowStore
from sphere.catalog.schema import Level

T = TypeVar("T")
NOTHING = Touched()


@dataclass(frozen=True)
class Index:
    """One version of the catalog, open for reading. Closed by the garbage collector when the last cursor is gone.

    `paths` are the base and, if there is one, the refresh beside it. With a `grant`, nothing else is in it.
    """

    paths: tuple[Path, ...]
    versions: Mapping[str, int]
    connection: duckdb.DuckDBPyConnection
    instance_columns: frozenset[str]
    files: FileMap
    published: overlay.Published
    recent: Recent
    rows: RowStore | None = None
    instances: InstanceFiles = field(default_factory=InstanceFiles)
    grant: Grant | None = None
    idle: Mapping[str, list[duckdb.DuckDBPyConnection]] = field(default_factory=lambda: {"base": [], "overlay": []})

    @property
    def path(self) -> Path:
        """The file that this version is named by."""
        return self.paths[-1]

    def catch_up(self) -> None:
        """Take up what was deleted and what arrived since."""
        self.recent.catch_up()

    def ask(self, put: Callable[[Layer], T]) -> list[T]:
        """Put a question to each layer, as of one moment: `put` must have begun to read when it returns."""
        while True:
            touched = self.published.now()
            beside = [put(Layer(self, "overlay", touched))] if touched != NOTHING else []
            if self.published.now() is touched:  # else an arrival was taken up meanwhile
                return [put(Layer(self, "base", touched)), *beside]

    def is_sound(self) -> bool:
        """Whether the files can be read (every block has a checksum). Slow: for when something went wrong."""
        cursor = self.connection.cursor()
        try:
            for source in self.files.sources:
                rolled = INDEXED if source == "base" else [f"{overlay.SCHEMA}.{name}" for name in overlay.ROLLED]
                for name in (*rolled, "study_files", "sop_files", "files"):
                    cursor.execute(f"SELECT bit_xor(hash(x)) FROM {source}.{name} x").fetchall()
        except duckdb.Error:
            return False
        finally:
            cursor.close()
        return True


@dataclass(frozen=True)
class Layer:
    """Where a query is put: tables `patients`, `studies` and `series`, and instances in files and among the arrivals.

    ``base`` is the file, without what is `touched`; ``overlay`` is what stands in place of that.
    """

    index: Index
    name: Literal["base", "overlay"]
    touched: Touched

    @contextmanager
    def cursor(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """A connection of one's own, for one query of one thread; left in the middle of it, it is closed."""
        idle = self.index.idle[self.name]
        try:
            cursor = idle.pop()
        except IndexError:
            cursor = self.index.connection.cursor()
            cursor.execute("USE base" if self.name == "base" else f"USE memory.{overlay.SCHEMA}")
        try:
            yield cursor
        except BaseException:
            cursor.close()
            raise
        idle.append(cursor)

    @property
    def folder(self) -> Path:
        """Where what a query must put aside goes."""
        return self.index.path.parent

    def dropped(self, level: Level) -> frozenset[str]:
        """The identifying values (the first of `plan.ORDER`) of rows that do not count."""
        if self.name == "overlay":
            return frozenset()
        return self.touched.patients if level == "PATIENT" else self.touched.studies

    @property
    def reads_files_whole(self) -> bool:
        """Whether `instances` gives of a study what its files hold, nothing hidden and nothing beside."""
        return self.name == "base" and self.index.grant is None

    def instances(self, files: Sequence[str], names: Sequence[str]) -> tuple[str, list[Any]] | None:
        """SQL of a relation with the columns `names` of the instances in `files` and of the recent ones, and its
        values; None where there are neither."""
        read = instances_sql(names, self.index.grant)
        if self.name == "base" or not self.index.recent.differs:
            return (read, [list(files)]) if files else None
        recent = ", ".join(f'{column_of(name)} AS "{name}"' for name in names)
        arrived = f"SELECT {recent} FROM memory.recent.arrivals WHERE shown"
        if not files:
            return f"({arrived})", []
        catalogued = ", ".join(f'b."{name}"' for name in names)
        hidden = "ANTI JOIN memory.recent.hidden h ON h.SOPInstanceUID = b.SOPInstanceUID"
        return f"(SELECT {catalogued} FROM {read} b {hidden} UNION ALL {arrived})", [list(files)]

    def instance_files(self, study_instance_uids: Sequence[str] | None) -> list[str]:
        """The files of `instances` that hold any of the studies; None: all of the layer."""
        if study_instance_uids is None and self.name == "base":
            return self.index.files.all()
        studies = sorted(self.touched.studies) if study_instance_uids is None else study_instance_uids
        with self.cursor() as cursor:
            return self.index.files.of_studies(cursor, studies)

    def files_of_instances(self, sop_instance_uids: Sequence[str]) -> list[str]:
        """The files that hold any of the instances (rarely one more, as hashes are compared)."""
        with self.cursor() as cursor:
            return self.index.files.of_instances(cursor, sop_instance_uids)
