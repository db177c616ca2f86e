"""Extraction: what landed and is not yet catalogued becomes rows, exactly once.

A batch goes through the same steps whether it is new or was begun by a run that died: each step leaves the tables as an
undisturbed run would, `bundles` comes last, and what is done already is found done. What the steps are is in
docs/decisions/0006-extraction.md.
"""

from __future__ import annotations

import gc
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from typing import Any

from deltalake.exceptions import DeltaError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from sphere.catalog.lock import CatalogLock
from sphere.conf.errors import JobFailed, StorageError
from sphere.conf.settings import Settings
from sphere.ingest.folders import SealedFolders
from sphere.ingest.journal import Landed
from sphere.ingest.records import MemberRecord
from sphere.ingest.recovery import recover
from sphere.ingest.storage import open_storage
from sphere.jobs import conflicts, rollup
from sphere.jobs.annotations import follow
from sphere.jobs.catalogued import Catalogued
from sphere.jobs.headers import STAGING, HeadersRead, read_headers
from sphere.jobs.plan import Batch, Members, Plan, batches, known_instances, plan
from sphere.jobs.progress import watched
from sphere.jobs.report import Report
from sphere.jobs.tables import Tables
from sphere.jobs.tombstones import Deletions
from sphere.jobs.versions import place

OnStep = Callable[..., None]
STEPS = (
    "lock",
    "recover",
    "discover",
    "plan",
    "headers",
    "instances",
    "quarantine",
    "conflicts",
    "replace",
    "roll up",
    "contradictions",
    "patients",
    "studies",
    "series",
    "bundles",
    "annotations",
    "done",
)
"""Names that `on_step` is called with, in the order of a batch that needs them all.

Where something was deleted or restored there is "tombstones" too, and steps of a batch come before "discover".
"""

_log = logging.getLogger(__name__)


class Kept:
    """What a run leaves to the next one of the same process and archive: the tables stay open, and what `bundles` says
    is known."""

    def __init__(self, settings: Settings) -> None:
        self.tables = Tables(settings)
        self.catalogued = Catalogued(self.tables)


def run(spark: SparkSession, settings: Settings, *, on_step: OnStep | None = None, kept: Kept | None = None) -> Report:
    """Catalogue everything that landed; `on_step` is called with the name of each step as it begins.

    While headers are read it is called as ``on_step("headers", done, total)`` again and again, in members. With `kept`,
    which several runs are given, nothing is opened that an earlier one has opened.

    Raises LockHeld while another process writes the catalog (after waiting ``extract.lock_wait_s``), JobFailed when a
    step failed: what was not finished will be by the next run.
    """
    steps = Steps(on_step or (lambda *_: None))
    steps.begin("lock")
    with CatalogLock(settings, job="extract") as lock, _failures(), _garbage_later():
        kept = kept or Kept(settings)
        kept.tables.look_again()
        job = _Extraction(spark, settings, steps, lock, kept)
        report = job.run()
        steps.begin("done")
    return report + Report(seconds=steps.finish())


class Steps:
    """Tells who wants to know which step begins, and keeps the time of each."""

    def __init__(self, tell: OnStep) -> None:
        self.tell = tell
        self._name = ""
        self._since = time.monotonic()
        self._seconds: dict[str, float] = {}

    def begin(self, name: str, *details: object) -> None:
        """The step before ends, this one begins."""
        now = time.monotonic()
        if self._name:
            self._seconds[self._name] = self._seconds.get(self._name, 0.0) + now - self._since
        self._name, self._since = name, now
        _log.debug("step %s", name)
        self.tell(name, *details)

    def finish(self) -> dict[str, float]:
        """Seconds of every step."""
        self._name, name = "", self._name
        self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - self._since
        return self._seconds


@contextmanager
def _failures() -> Iterator[None]:
    """Spark's errors as one of ours, without Java's stack."""
    try:
        yield
    except PySparkException as error:
        lines = [line for line in str(error).splitlines() if line.strip() and not line.lstrip().startswith("at ")]
        raise JobFailed(f"extraction stopped: {lines[-1].strip() if lines else type(error).__name__}") from error
    except DeltaError as error:
        raise JobFailed(f"extraction stopped: the catalog could not be read or written: {error}") from error


@contextmanager
def _garbage_later() -> Iterator[None]:
    """Leave cycles to the batches' ends: the records of a batch are many, live as long as it does and have none, and
    each look at everything else that this process holds takes a tenth of a second."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class _Extraction:
    """One run, under the lock."""

    def __init__(self, spark: SparkSession, settings: Settings, steps: Steps, lock: CatalogLock, kept: Kept) -> None:
        self._spark = spark
        self._settings = settings
        self._steps = steps
        self._lock = lock
        self._tables, self._catalogued = kept.tables, kept.catalogued
        self._storage = open_storage(settings.storage.root, user=settings.storage.user)
        self._catalog = open_storage(settings.catalog_root, user=settings.storage.user)
        self._deletions = Deletions(settings, self._tables)
        self._landed = Landed(self._storage, folders=SealedFolders(self._storage, settings.archive.state_dir))

    def run(self) -> Report:
        with closing(self._deletions):
            return self._run()

    def _run(self) -> Report:
        self._steps.begin("recover")
        with ThreadPoolExecutor(1) as beside:
            reading = beside.submit(self._catalogued.rows)
            recover(self._storage, self._settings)
            self._sweep()
            rollup.refresh(self._tables, self._settings, on_step=self._steps.begin)  # what a killed run left behind
            catalogued = reading.result()
        report = self._follow_tombstones()  # what was restored changes no row of `bundles`
        self._steps.begin("discover")
        for batch in batches(self._landed, catalogued, self._settings.extract.batch):
            report += self._batch(batch)
            gc.collect(1)
            self._steps.begin("discover")
        self._steps.begin("annotations")
        follow(self._tables, self._settings)
        return report

    def _follow_tombstones(self) -> Report:
        """Take out of the tables what was deleted since, and put in what was restored.

        An empty commit to `bundles` then says that this is complete, to who asks as of it, and to indexes.
        """
        report = Report()
        for deleted, restored in self._deletions.pending():
            members = Members(self._landed)
            if deleted:
                count = self._deletions.take_out(self._spark, deleted, members, on_step=self._steps.begin)
                self._steps.begin("roll up")
                rollup.refresh(self._tables, self._settings, on_step=self._steps.begin)
                report += Report(deleted=count)
            for batch in self._deletions.restored(restored, members):
                report += self._batch(batch)
            self._lock.check()
            self._steps.begin("bundles")
            self._tables.append("bundles", [], onto=self._tables.ensure("bundles"))
        return report

    def _sweep(self) -> None:
        """Remove what earlier batches staged."""
        for entry in list(self._catalog.walk(STAGING)):
            with suppress(StorageError):  # rows that nobody refers to: the next run tries again
                self._catalog.delete(entry.path)

    def _batch(self, batch: Batch) -> Report:
        self._steps.begin("plan")
        came = len(batch.records)
        batch = batch.without(self._deletions.bury((one, one.SOPInstanceUID) for one in batch.records))
        instances = self._tables.latest("instances")
        onto = instances.version() if instances else -1
        known = known_instances(self._tables, instances, (record.SOPInstanceUID for record in batch.records))
        planned = plan(batch.records, known)
        total = len(planned.new) + len(planned.contested)
        self._steps.begin("headers", 0, total)
        with watched(self._spark.sparkContext, lambda part: self._steps.tell("headers", int(part * total), total)):
            found = read_headers(self._spark, self._settings, new=planned.new, contested=planned.contested)
        self._lock.check()
        batch = self._told_by_headers(batch, found)
        if found.files:
            self._steps.begin("instances")
            rollup.foresee(self._tables, found.rolled)
            joined = self._tables.join_small(instances)
            self._tables.append("instances", found.files, joined=joined, onto=instances)
        elif instances is None:
            self._tables.ensure("instances")
        rejected = self._quarantine(batch, planned, found)
        settled = self._settle(batch, found)
        self._steps.begin("roll up")
        added = rollup.Added(onto, found.rolled) if found.files else None
        rollup.refresh(self._tables, self._settings, on_step=self._steps.begin, added=added)
        self._lock.check()
        self._steps.begin("bundles")
        self._tables.merge("bundles", batch.bundles)
        if batch.restored:
            self._deletions.release(batch.records)
        self._sweep()
        return _count(batch, planned, found, settled, rejected) + Report(deleted=came - len(batch.records))

    def _told_by_headers(self, batch: Batch, found: HeadersRead) -> Batch:
        """The batch without those whose headers, unlike the journals, name a deleted instance."""
        if not found.contested:
            return batch
        by_place = {place(record): record for record in batch.records}
        gone = self._deletions.bury((by_place[where], uid) for where, uid in found.contested.items())
        for where in gone:
            del found.contested[where]
        return batch.without(gone)

    def _quarantine(self, batch: Batch, planned: Plan, found: HeadersRead) -> Counter[str]:
        """Write the rejected members, and all copies of them, into `quarantine`; returns how many by reason."""
        if not found.rejected:
            return Counter()
        self._steps.begin("quarantine")
        by_place = {place(record): record for record in batch.records}
        rows = []
        for where, (reason, detail) in found.rejected.items():
            for record in (by_place[where], *planned.copies.get(where, ())):
                rows.append(_quarantined(record, reason, detail))
        self._tables.merge("quarantine", rows)
        return Counter(row["reason"] for row in rows)

    def _settle(self, batch: Batch, found: HeadersRead) -> conflicts.Outcome:
        """Write `conflicts`, then the winners among contested versions into `instances`."""
        if not found.contested:
            return conflicts.Outcome()
        self._steps.begin("conflicts")
        members = Members(self._landed, batch.records)
        decided = conflicts.decide(self._tables, members, found.contested, self._settings)
        self._tables.merge("conflicts", decided.conflicts, gone=decided.gone)
        if decided.winners:
            self._steps.begin("replace")
            conflicts.replace(self._spark, self._settings, self._tables, decided, found)
        shown = {uid for uid, winner in decided.winners.items() if place(winner) in found.contested}
        return conflicts.Outcome(len(shown), len(shown & decided.replaced.keys()), len(decided.conflicts))


def _quarantined(record: MemberRecord, reason: str, detail: str) -> dict[str, Any]:
    return {
        "bundle": record.bundle,
        "offset": record.offset,
        "length": record.length,
        "dataset_offset": record.dataset_offset,
        "reason": reason,
        "detail": detail,
        "SOPInstanceUID": record.SOPInstanceUID,
        "StudyInstanceUID": record.StudyInstanceUID,
        "SeriesInstanceUID": record.SeriesInstanceUID,
        "SOPClassUID": record.SOPClassUID,
        "transfer_syntax_uid": record.TransferSyntaxUID,
        "sha256": record.sha256,
        "received_at": record.received_at,
        "source_aet": record.source_aet,
        "origin": record.origin,
    }


def _count(
    batch: Batch, planned: Plan, found: HeadersRead, settled: conflicts.Outcome, reasons: Mapping[str, int]
) -> Report:
    rejected = sum(reasons.values())
    rows = found.rows + len(planned.present) + settled.rows
    return Report(
        read=len(batch.records),
        rows=rows,
        updated=settled.updated,
        duplicates=len(batch.records) - rows - rejected,
        conflicts=settled.conflicts,
        rejected=rejected,
        restored=len(batch.records) if batch.restored else 0,
        batches=1,
        reasons=reasons,
    )
