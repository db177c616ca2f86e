"""Reading headers on the Spark executors: members in, Parquet files of finished rows out.

Each task reads neighbouring members and writes its rows itself, in the order of studies, next to the table's other
files; they belong to the table once the driver commits them. Rows that have yet to be settled against another version
go into a file of their own below STAGING. Only names, reasons and counts travel back.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime, timedelta, timezone
from operator import attrgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyspark.sql import SparkSession

from sphere.catalog.schema import TABLES, TEXTS, TIMESTAMP
from sphere.conf.errors import RejectReason, SphereError
from sphere.conf.settings import Settings
from sphere.ingest.header import Header, HeaderReader, Rejected, RowBuilder
from sphere.ingest.records import MemberRecord
from sphere.ingest.storage import open_storage
from sphere.jobs.parquet import ROW_GROUP, FileWriter
from sphere.jobs.ranges import Fetch, prefixes
from sphere.jobs.tables import NewFile
from sphere.jobs.versions import Place, place

STAGING = "_staging"
"""Folder below the catalog root for rows of contested versions; empty between two runs."""
TASK_MEMBERS = 16_384
"""Members of one task, and so rows of one file, at most."""
_ROW_GROUP_BYTES = 64 * 1024 * 1024  # of datasets, above which a row group ends early

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_NAMES = [name.name for name in fields(MemberRecord)]
_RECORD = attrgetter(*_NAMES)
_INTEGERS = {"offset": pa.int64(), "length": pa.int64(), "dataset_offset": pa.int64(), "received_at": TIMESTAMP}
_TYPES = {**_INTEGERS, "collections": TEXTS}
_RECORD_TYPES = [_TYPES.get(name, pa.string()) for name in _NAMES]
# received_at travels as microseconds since 1970: Spark would give it the session's time zone.
_PLAN = pa.schema(
    [(name, pa.int64() if name in _INTEGERS else _TYPES.get(name, pa.string())) for name in _NAMES]
    + [("contested", pa.bool_())]
)
_RESULT = pa.schema(
    [
        ("kind", pa.string()),  # "file", "staged", "contested" or "rejected"
        ("bundle", pa.string()),
        ("offset", pa.int64()),
        ("uid", pa.string()),  # contested: the SOP Instance UID that the header gives
        ("reason", pa.string()),  # rejected
        ("detail", pa.string()),
        ("path", pa.string()),  # file, staged: the columns of a NewFile
        ("size", pa.int64()),
        ("modified_ms", pa.int64()),
        ("stats", pa.string()),
        ("rows", pa.int64()),
    ]
)
_RESULT_DDL = ", ".join(f"`{column.name}` {'bigint' if column.type == pa.int64() else 'string'}" for column in _RESULT)


@dataclass(slots=True)
class HeadersRead:
    """What became of the members: `rows` of them are in `files`, the contested ones in `staged` files or rejected."""

    rows: int = 0
    files: list[NewFile] = field(default_factory=list)
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
    longest = int(spark.conf.get("spark.sql.execution.arrow.maxRecordsPerBatch") or TASK_MEMBERS)
    tasks = _split(members, parallelism=spark.sparkContext.defaultParallelism, longest=longest)
    # One partition a chunk: neighbouring members stay together, in order.
    frame = spark.createDataFrame(pa.concat_tables(map(_planned, tasks)))
    found = frame.mapInArrow(_Task(Sources.of(settings)), _RESULT_DDL).toArrow()
    return _collect(found.to_pylist())


def _by_study(record: MemberRecord) -> tuple[str, str, str, int]:
    return record.StudyInstanceUID, record.SeriesInstanceUID, record.bundle, record.offset


def _split(members: Sequence[Any], *, parallelism: int, longest: int) -> list[Sequence[Any]]:
    """Equal pieces: as many as cores, or multiples of that where a piece would be too long."""
    most = min(TASK_MEMBERS, longest)
    rounds = -(-len(members) // (most * parallelism))
    size = -(-len(members) // (rounds * parallelism))
    return [members[start : start + size] for start in range(0, len(members), size)]


def _planned(members: Sequence[tuple[MemberRecord, bool]]) -> pa.Table:
    columns = list(zip(*(_RECORD(record) for record, _ in members), strict=True))
    arrays = [pa.array(column, type_) for column, type_ in zip(columns, _RECORD_TYPES, strict=True)]
    arrays.append(pa.array([contested for _, contested in members], pa.bool_()))
    return pa.table([array.cast(type_) for array, type_ in zip(arrays, _PLAN.types, strict=True)], schema=_PLAN)


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
        else:
            read.files.append(NewFile(result["path"], result["size"], result["modified_ms"], result["stats"]))
            read.rows += result["rows"]
    return read


class _Task:
    """One Spark task; sent to the executors with nothing but its sources."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        schema = TABLES["instances"].schema
        sink = _Sink(schema)
        reader = _reader(self._sources.max_header)
        storage = open_storage(self._sources.storage, user=self._sources.user)
        for batch in batches:
            rows = batch.to_pylist()
            beginnings = prefixes(storage, [(row["bundle"], row["offset"], row["length"]) for row in rows])
            for row, (prefix, fetch) in zip(rows, beginnings, strict=True):
                contested = row.pop("contested")
                row["received_at"] = _EPOCH + timedelta(microseconds=row["received_at"])
                row["collections"] = tuple(row["collections"])
                record = MemberRecord(**row)
                sink.add(record, _read(reader, record, prefix, fetch), contested)
        results = sink.finish(self._sources)
        yield pa.RecordBatch.from_pylist(results, schema=_RESULT)


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
    """Collects the outcome of one task."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._rows = {contested: RowBuilder(schema) for contested in (False, True)}
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
        if len(rows) >= ROW_GROUP or rows.nbytes >= _ROW_GROUP_BYTES:
            self._flush(contested)

    def _flush(self, contested: bool) -> None:
        if contested not in self._files:
            self._files[contested] = FileWriter(self._schema)
        self._files[contested].add(self._rows[contested].batch())

    def finish(self, sources: Sources) -> list[dict[str, Any]]:
        storage = open_storage(sources.catalog, user=sources.user)
        for contested, rows in self._rows.items():
            if len(rows):
                self._flush(contested)
            if contested in self._files:
                writer = self._files[contested]
                file = writer.finish(storage, STAGING if contested else "instances")
                self._tell(
                    "staged" if contested else "file",
                    path=file.path,
                    size=file.size,
                    modified_ms=file.modified_ms,
                    stats=file.stats,
                    rows=writer.rows,
                )
        return self._results

    def _tell(self, kind: str, **what: Any) -> None:
        self._results.append({"kind": kind, **what})
