"""Reading headers on the Spark executors: members in, Parquet files of finished rows out.

Each task reads neighbouring members and writes its rows itself, in the order of studies, next to the table's other
files; they belong to the table once the driver commits them. Rows that have yet to be settled against another version
go into a file of their own below STAGING. Only names, reasons and counts travel back.
"""

from __future__ import annotations

import functools
import gc
import itertools
import sys
import traceback
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
from pyspark import TaskContext
from pyspark.sql import DataFrame, SparkSession

from sphere.catalog.schema import TABLES, TEXTS
from sphere.conf.errors import RejectReason, SphereError
from sphere.conf.settings import Settings
from sphere.ingest.header import Header, HeaderReader, Rejected, RowBuilder
from sphere.ingest.journal import to_lines
from sphere.ingest.records import MemberRecord
from sphere.ingest.storage import open_storage
from sphere.jobs.parquet import INDEXED, ROW_GROUP, FileWriter, NewFile
from sphere.jobs.ranges import Fetch, prefixes
from sphere.jobs.rolling import COLUMNS, NEEDED, ROLLED, Rolled, packed, roll_up
from sphere.jobs.versions import Place, place

STAGING = "_staging"
"""Folder below the catalog root for the members of each task and rows of contested versions; empty between two runs."""
TASK_MEMBERS = 16_384
"""Members of one task, and so rows of one file, at most; a cut between two studies may add a twentieth."""
_LEEWAY = 20
_FILE_BYTES = 64 * 1024 * 1024  # of datasets, above which a row group ends early, and a file: it is made in memory

# A member travels as its line of the journal.
_PLAN = pa.schema([("new", pa.binary()), ("contested", pa.binary()), ("split", TEXTS)])
_ALWAYS = frozenset((*TABLES["instances"].schema.names[:INDEXED], *NEEDED))  # columns that a batch of rows has
_JOB = "sphere.headers"  # the local property of a Spark job that says what its tasks are
_RESULT = pa.schema(
    [
        ("kind", pa.string()),  # "file", "staged", "rolled", "contested" or "rejected"
        ("bundle", pa.string()),
        ("offset", pa.int64()),
        ("uid", pa.string()),  # contested: the SOP Instance UID that the header gives
        ("reason", pa.string()),  # rejected
        ("detail", pa.string()),
        ("path", pa.string()),  # file, staged: the columns of a NewFile
        ("size", pa.int64()),
        ("modified_ms", pa.int64()),
        ("stats", pa.string()),
        ("count", pa.int64()),  # file: rows in it
        ("series", pa.binary()),  # rolled: what Rolled packs
        ("studies", pa.binary()),
        ("rows", pa.binary()),
        ("said", pa.binary()),
    ]
)
# What a task tells is rows of _RESULT, which travel as one value: for each task Spark makes a program for the columns.
_FOUND = pa.schema([("found", pa.binary())])
_FOUND_DDL = "found binary"


@dataclass(slots=True)
class HeadersRead:
    """What became of the members: `rows` of them are in `files`, the contested ones in `staged` files or rejected.

    ``rolled`` has the roll-ups of the rows in `files`, by task.
    """

    rows: int = 0
    files: list[NewFile] = field(default_factory=list)
    rolled: list[Rolled] = field(default_factory=list)
    staged: list[str] = field(default_factory=list)  # paths below the catalog root
    contested: dict[Place, str] = field(default_factory=dict)  # SOP Instance UID by place
    rejected: dict[Place, tuple[str, str]] = field(default_factory=dict)  # (reason, detail) by place


@dataclass(frozen=True, slots=True)
class Sources:
    """Where executors find bytes and put rows: root URLs, HDFS user, and the limit of a header in bytes."""

    storage: str
    catalog: str
    user: str
    max_header: int

    @classmethod
    def of(cls, settings: Settings) -> Sources:
        """Those of an archive."""
        return cls(
            storage=settings.storage.root,
            catalog=settings.catalog_root,
            user=settings.storage.user,
            max_header=settings.extract.max_header_mib << 20,
        )


def read_headers(
    spark: SparkSession,
    settings: Settings,
    *,
    new: Iterable[MemberRecord] = (),
    contested: Iterable[MemberRecord] = (),
) -> HeadersRead:
    """Read the headers of the members; what Spark raises when a bundle cannot be read goes through."""
    members = [(record, False) for record in new] + [(record, True) for record in contested]
    if not members:
        return HeadersRead()
    members.sort(key=lambda item: _by_study(item[0]))
    tasks = in_tasks(members, parallelism=spark.sparkContext.defaultParallelism)
    job = _Job.laid_out(Sources.of(settings), list(_planned(tasks)))
    context = spark.sparkContext
    context.setLocalProperty(_JOB, orjson.dumps(asdict(job)).decode())
    try:
        found = _frame(spark, len(tasks)).toArrow()
    finally:
        context.setLocalProperty(_JOB, "")
    return _collect(
        row for rows in found["found"].to_pylist() for row in pa.ipc.open_stream(rows).read_all().to_pylist()
    )


@functools.lru_cache(maxsize=8)
def _frame(spark: SparkSession, tasks: int) -> DataFrame:
    """What so many tasks find, in the job that the local property says: analysed, optimized and planned once, as Spark
    takes longer for that than for starting the tasks."""
    return spark.range(0, tasks, 1, tasks).mapInArrow(_run, _FOUND_DDL)


def _by_study(record: MemberRecord) -> tuple[str, str, str, int]:
    return record.StudyInstanceUID, record.SeriesInstanceUID, record.bundle, record.offset


def in_tasks(members: Sequence[Any], *, parallelism: int) -> list[Sequence[Any]]:
    """Pieces of about one size: as many as cores, or multiples of that where a piece would be too long.

    A cut moves to the nearest place between two studies, where that is at most a twentieth of a piece away: a study in
    two pieces is rolled up by the driver, while all else waits.
    """
    rounds = -(-len(members) // (TASK_MEMBERS * parallelism))
    size = -(-len(members) // (rounds * parallelism))
    cuts = [_between_studies(members, cut, size // _LEEWAY) for cut in range(size, len(members), size)]
    return [members[start:end] for start, end in itertools.pairwise([0, *cuts, len(members)])]


def _between_studies(members: Sequence[Any], cut: int, leeway: int) -> int:
    """The nearest place to `cut`, at most `leeway` members away, where a study begins; `cut` where there is none."""

    def study(at: int) -> str:
        uid: str = members[at][0].StudyInstanceUID
        return uid

    for away in range(leeway + 1):
        for at in (cut - away, cut + away):
            if 0 < at < len(members) and study(at) != study(at - 1):
                return at
    return cut


def _planned(tasks: Sequence[Sequence[tuple[MemberRecord, bool]]]) -> Iterator[pa.RecordBatch]:
    """A row for each task."""
    ends = [(task[0][0].StudyInstanceUID, task[-1][0].StudyInstanceUID) for task in tasks]
    split = {last for (_, last), (first, _) in itertools.pairwise(ends) if last == first}
    for task, here in zip(tasks, ends, strict=True):
        row = {
            "new": to_lines([record for record, contested in task if not contested]),
            "contested": to_lines([record for record, contested in task if contested]),
            "split": sorted(split.intersection(here)),
        }
        yield pa.RecordBatch.from_pylist([row], schema=_PLAN)


def _collect(results: Iterable[dict[str, Any]]) -> HeadersRead:
    read = HeadersRead()
    for result in results:
        where = result["bundle"], result["offset"]
        if result["kind"] == "rejected":
            read.rejected[where] = result["reason"], result["detail"]
        elif result["kind"] == "contested":
            read.contested[where] = result["uid"]
        elif result["kind"] == "staged":
            read.staged.append(f"{STAGING}/{result['path']}")
        elif result["kind"] == "rolled":
            read.rolled.append(Rolled.unpack(**{name: result[name] for name in ROLLED}))
        else:
            read.files.append(NewFile(result["path"], result["size"], result["modified_ms"], result["stats"]))
            read.rows += result["count"]
    return read


@dataclass(frozen=True, slots=True)
class _Job:
    """What the tasks of one Spark job are: a file of the catalog's storage has their members, each task's in its range
    of bytes.

    A task that is tried again, or on two executors at once, finds the same.
    """

    sources: Sources
    path: str
    tasks: tuple[tuple[int, int], ...]  # offset and length of each

    @classmethod
    def laid_out(cls, sources: Sources, planned: Sequence[pa.RecordBatch]) -> _Job:
        """Write the file, which is there until who reads headers sweeps STAGING."""
        storage = open_storage(sources.catalog, user=sources.user)
        above = sys.maxsize if storage.in_files else 0  # on a local disk compression costs more than bytes do
        pieces = [packed(task, above=above) for task in planned]
        ends = list(itertools.accumulate(map(len, pieces)))
        job = cls(sources, f"{STAGING}/{uuid.uuid4()}.members", tuple(zip([0, *ends], map(len, pieces), strict=False)))
        storage.write(job.path, b"".join(pieces), durable=False)
        return job

    @classmethod
    def of_task(cls) -> _Job:
        """That of the task which this process runs."""
        context = TaskContext.get()
        assert context is not None  # Spark has one for every task
        told = orjson.loads(context.getLocalProperty(_JOB) or b"{}")
        return cls(Sources(**told["sources"]), told["path"], told["tasks"])

    def task(self, number: int) -> dict[str, Any]:
        """The row of _PLAN of a task."""
        offset, length = self.tasks[number]
        data = open_storage(self.sources.catalog, user=self.sources.user).read(self.path, offset, length)
        row: dict[str, Any] = pa.ipc.open_stream(data).read_all().to_pylist()[0]
        return row


def _run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Spark tasks, each of which is a row with its number."""
    job = _Job.of_task()
    for number in (number for batch in batches for number in batch.column(0).to_pylist()):
        rows = pa.RecordBatch.from_pylist(_read_task(job.sources, job.task(number)), schema=_RESULT)
        yield pa.RecordBatch.from_arrays([pa.array([packed(rows)], pa.binary())], schema=_FOUND)
    _stay()


@functools.cache
def _stay() -> None:
    """After the first task of a worker process: what that loaded and remembers stays, and is not looked at again by the
    search for garbage that follows every task, which would take 12 ms."""
    gc.collect()
    gc.freeze()


def _read_task(sources: Sources, task: Mapping[str, Any]) -> list[dict[str, Any]]:
    reader = _reader(sources.max_header)
    storage = open_storage(sources.storage, user=sources.user)
    sink = _Sink(sources, split=task["split"])
    for contested in (False, True):
        lines = task["contested" if contested else "new"].split(b"\n")[:-1]
        records = [MemberRecord.from_json(line) for line in lines]
        beginnings = prefixes(storage, [(record.bundle, record.offset, record.length) for record in records])
        for record, (prefix, fetch) in zip(records, beginnings, strict=True):
            sink.add(record, _read(reader, record, prefix, fetch), contested)
    return sink.finish()


@functools.cache
def _reader(max_header: int) -> HeaderReader:
    """One reader for all tasks of a worker process (which has one thread): it remembers what headers look like."""
    return HeaderReader(max_header=max_header)


def _read(reader: HeaderReader, record: MemberRecord, prefix: bytes, fetch: Fetch) -> Header | Rejected:
    try:
        return reader.read(prefix, size=record.length, fetch=fetch)
    except SphereError:
        raise  # the storage failed: the task does, and may be tried again
    except Exception as error:  # noqa: BLE001  a defect of the reader costs one member, and is kept with it
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Rejected(RejectReason.INTERNAL, f"{type(error).__name__} in {Path(where.filename).name}:{where.lineno}")


class _Sink:
    """Collects the outcome of one task, and puts its files on the storage of the catalog."""

    def __init__(self, sources: Sources, *, split: Collection[str]) -> None:
        self._storage = open_storage(sources.catalog, user=sources.user)
        self._split = split
        self._rolled: list[pa.Table] = []
        schema = TABLES["instances"].schema
        self._rows = {contested: RowBuilder(schema, always=_ALWAYS) for contested in (False, True)}
        self._files: dict[bool, FileWriter] = {}
        self._results: list[dict[str, Any]] = []

    def add(self, record: MemberRecord, header: Header | Rejected, contested: bool) -> None:
        bundle, offset = place(record)
        if isinstance(header, Rejected):
            reason, detail = header.reason.value, header.detail
            self._tell("rejected", bundle=bundle, offset=offset, reason=reason, detail=detail)
            return
        uid = header.values["SOPInstanceUID"]
        if contested or uid != record.SOPInstanceUID:
            contested = True
            self._tell("contested", bundle=bundle, offset=offset, uid=uid)
        rows = self._rows[contested]
        rows.append(header, record)
        if len(rows) >= ROW_GROUP:
            self._end_group(contested)
        elif rows.nbytes >= _FILE_BYTES:
            self._end_file(contested)

    def finish(self) -> list[dict[str, Any]]:
        for contested in (False, True):
            self._end_file(contested)
        if self._rolled:
            rows = pa.concat_tables(self._rolled, promote_options="default")
            self._tell("rolled", **roll_up(rows, split=self._split).pack())
        return self._results

    def _end_group(self, contested: bool) -> None:
        if contested not in self._files:
            self._files[contested] = FileWriter(TABLES["instances"])
        batch = self._rows[contested].batch()
        self._files[contested].add(batch)
        if not contested:
            there = set(batch.schema.names)
            self._rolled.append(pa.Table.from_batches([batch]).select([name for name in COLUMNS if name in there]))

    def _end_file(self, contested: bool) -> None:
        if len(self._rows[contested]):
            self._end_group(contested)
        writer = self._files.pop(contested, None)
        if writer is None:
            return
        file = writer.finish(self._storage, STAGING if contested else "instances")
        self._tell(
            "staged" if contested else "file",
            path=file.path,
            size=file.size,
            modified_ms=file.modified_ms,
            stats=file.stats,
            count=writer.rows,
        )

    def _tell(self, kind: str, **what: Any) -> None:
        self._results.append({"kind": kind, **what})
