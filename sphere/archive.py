"""The Python API: one object for one archive, the same that the command line uses.

import sphere
archive = sphere.open("sphere.toml")
archive.sql("SELECT Modality, count(*) FROM instances GROUP BY Modality").to_pandas()
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sphere.conf.errors import SettingsError, StatementError
from sphere.conf.loading import load_archive
from sphere.conf.settings import Settings

if TYPE_CHECKING:
    from datetime import datetime, timedelta

    import pyarrow as pa
    from pyspark.sql import SparkSession

    from sphere.catalog.queries import Queries
    from sphere.catalog.schema import Level
    from sphere.ingest.media import Imported
    from sphere.jobs.compact_report import CompactReport
    from sphere.jobs.extract import Kept
    from sphere.jobs.report import Report
    from sphere.status import Status


def open(config: str | Path | None = None) -> Archive:
    """The archive of a settings file (default: SPHERE_CONFIG, else ./sphere.toml, else SPHERE_STORAGE__ROOT names it).

    Raises SettingsError when the file is missing or wrong.
    """
    return Archive(load_archive(Path(config) if config is not None else None))


def plain_values(dataset: Any) -> dict[str, Any]:
    """A data set as a dict from keyword (else tag) to str, int, float, None, a list of these, or dicts for items."""
    return {element.keyword or f"{element.tag:08X}": _plain(element.value) for element in dataset}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bytes):
        return value or None
    if isinstance(value, (list, tuple)) or type(value).__name__ in ("MultiValue", "Sequence"):
        return [plain_values(one) if hasattr(one, "elements") else _plain(one) for one in value]
    for kind in (int, float):
        if isinstance(value, kind):
            return kind(value)
    return str(value) or None


class Archive:
    """An archive: its storage, catalog and query service. Spark starts with the first call that needs it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._spark: SparkSession | None = None
        self._queries: Queries | None = None
        self._kept: Kept | None = None

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the query index and of open tables, and stop the Spark session if this archive started one."""
        self._kept = None
        if self._queries is not None:
            self._queries.close()
            self._queries = None
        if self._spark is not None:
            self._spark.stop()
            self._spark = None

    def spark(self) -> SparkSession:
        """A Spark session with Delta in which the catalog's tables are views of their names, as of now.

        Raises ExternalMissing where Java is missing, SettingsError with ``catalog.mode = "files"``.
        """
        from sphere.jobs.session import register_tables

        spark = self._session()
        register_tables(spark, self.settings)
        return spark

    def _session(self) -> SparkSession:
        if self.settings.catalog.mode == "files":
            raise SettingsError(
                'catalog.mode is "files": there are no tables to make or ask; set it to "delta", then sphere extract'
            )
        from sphere.jobs.session import spark_session

        if self._spark is None:
            self._spark = spark_session(self.settings, app_name="sphere")
        return self._spark

    def sql(self, statement: str) -> pa.Table:
        """The answer of one Spark SQL statement that asks (SELECT, DESCRIBE, SHOW, EXPLAIN) as an Arrow table.

        Raises StatementError, a QueryError, where it does anything else, nothing of which is done, or with Spark's
        explanation.
        """
        from pyspark.errors import PySparkException

        from sphere.catalog.schema import TABLES
        from sphere.jobs.session import register_tables
        from sphere.jobs.statements import check_asks

        words = set(re.findall(r"\w+", statement.lower()))
        spark = self._session()
        register_tables(spark, self.settings, [name for name in TABLES if name in words])
        try:
            check_asks(spark, statement)
            return spark.sql(statement).toArrow()
        except PySparkException as error:
            raise StatementError(str(error).split("\n\nJVM stacktrace")[0].split(";\n'")[0].strip()) from None

    def queries(self) -> Queries:
        """The query service: `find`, `count` and `lookup_instances` of Query values. Opened once, closed by `close`."""
        from sphere.catalog.queries import open_queries

        if self._queries is None:
            self._queries = open_queries(self.settings)
        return self._queries

    def find(
        self,
        level: Level,
        keys: Mapping[str, Any] | None = None,
        *,
        return_keys: Iterable[str] = (),
        as_of: int | datetime | None = None,
        fuzzy_names: bool = False,
        combined_datetime: bool = False,
        timezone: str = "",
        limit: int | None = None,
        offset: int = 0,
    ) -> Iterator[dict[str, Any]]:
        """Entities of a level that match the keys (keyword to value, as in a C-FIND identifier), one dict of plain
        Python values each: `pandas.DataFrame(archive.find("STUDY", {"PatientName": "DOE*"}))`.

        `""` as text in quotes (`'""'`) finds what has no value, a list what has all of its values. A private attribute
        is named "GGGGEEEE,CREATOR". `as_of` asks an earlier catalog: a version of table `bundles`, which counts batches
        of extraction, or a time (UTC where it has no zone). `fuzzy_names`, `combined_datetime` and `timezone` ("+0100")
        are what C-FIND negotiates. `offset` answers are passed over, then at most `limit` given, in the order of unique
        keys. Raises QueryError for keys that break PS3.4 C.2.2.2, CatalogError for a version that
        is not known.
        """
        from sphere.catalog.query import Query
        from sphere.finding import part_of

        query = Query.build(
            level,
            dict(keys or {}),
            return_keys=tuple(return_keys),
            combined_datetime=combined_datetime,
            fuzzy_names=fuzzy_names,
            empty_values=True,
            multiple_values=True,
            timezone=timezone,
        )
        found = self.queries().find(query, as_of=as_of)
        for match in part_of(found, offset=offset, limit=limit):
            yield plain_values(match.identifier())

    def import_files(self, paths: Iterable[Path], *, only_dicom: bool = False) -> Iterator[Imported]:
        """Store files and folders; yields what became of each file when it is durable (see sphere.ingest.media)."""
        from sphere.catalog.known import KnownInstances, OnceWriter
        from sphere.catalog.queries import LateQueries
        from sphere.ingest.bundle import BundleWriter
        from sphere.ingest.media import import_files
        from sphere.ingest.storage import open_storage
        from sphere.scp.policy import Policy

        policy = Policy(self.settings)
        storage = open_storage(self.settings.storage.root, user=self.settings.storage.user)
        writer = BundleWriter(storage, self.settings)
        with closing(writer), LateQueries(self.settings) as finder:
            known = KnownInstances(self.settings, finder)
            yield from import_files(
                paths,
                OnceWriter(writer, known, self.settings.ingest.on_conflict),
                memory_bytes=self.settings.storage.memory_mib << 20,
                only_dicom=only_dicom,
                admit=lambda member: policy.admit(member, via="import"),
            )

    def delete(
        self,
        *,
        study: Sequence[str] = (),
        series: Sequence[str] = (),
        sop: Sequence[str] = (),
        where: Mapping[str, Any] | None = None,
        reason: str = "",
    ) -> int:
        """Show the instances of these studies and series, and with these UIDs, no more, or those that match the keys of
        `where`; returns how many there were.

        Raises NotThere where a UID names nothing, and QueryError. `undelete` shows them again.
        """
        from sphere import deleting

        queries = self.queries()
        found = deleting.choose(queries, {"study": study, "series": series, "sop": sop})
        if where is not None:
            found += deleting.choose_matching(queries, where)
        return deleting.delete(self.settings, found, reason=reason)

    def undelete(self, *, study: Sequence[str] = (), series: Sequence[str] = (), sop: Sequence[str] = ()) -> int:
        """Show deleted instances again; returns how many. Those that left the tables are back after an extraction.

        Raises NotThere where nothing is deleted of a UID, BytesGone where compaction has erased some of them.
        """
        from sphere import deleting

        found = deleting.choose_deleted(self.settings, {"study": study, "series": series, "sop": sop})
        return deleting.undelete(self.settings, found)

    def compact(
        self,
        *,
        after: timedelta | None = None,
        dry_run: bool = False,
        vacuum: timedelta | None = None,
        on_step: Callable[..., None] | None = None,
    ) -> CompactReport:
        """Erase the bytes of what was deleted `after` ago or longer (default: ``compact.after_days``); nothing else
        moves, and it cannot be undone. With `vacuum` what only earlier versions of the tables have goes as well, and
        these can no longer be asked.

        What could not be done is in the report's `failures`. Raises LockHeld while another process writes the catalog.
        """
        from sphere.compacting import compact

        return compact(self.settings, after=after, dry_run=dry_run, vacuum=vacuum, on_step=on_step)

    def extract(self, *, on_step: Callable[..., None] | None = None) -> Report:
        """Catalogue what landed and is not yet in the tables; raises LockHeld while another process does so."""
        from sphere.jobs.extract import Kept, run

        self._kept = self._kept or Kept(self.settings)
        report = run(self._session(), self.settings, on_step=on_step, kept=self._kept)
        self.load_audit()
        return report

    def load_audit(self) -> int:
        """Bring the audit journal into table `audit`; returns how many records came. Raises LockHeld, JobFailed."""
        from sphere.jobs.audit import run

        return run(self.settings)

    def status(self) -> Status:
        """What is here, what waits for extraction, and what failed."""
        from sphere.status import take

        return take(self.settings)

    def waiting(self) -> int:
        """Members that landed and are not yet catalogued."""
        from sphere.status import waiting

        return waiting(self.settings)

    def annotated(self) -> bool:
        """Whether the table `annotations` lags behind what was annotated."""
        from sphere.jobs.annotations import waiting

        return waiting(self.settings)

    def buried(self) -> bool:
        """Whether the tables lag behind what was deleted and restored."""
        from sphere.jobs.tombstones import waiting

        return waiting(self.settings)
