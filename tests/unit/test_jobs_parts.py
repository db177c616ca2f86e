"""The parts of extraction that need no Spark: ranges, files with statistics, report, batches, synthetic series."""

from __future__ import annotations

import io
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydicom import dcmread

from sphere.catalog.schema import TABLES, Table
from sphere.ingest.header import Header, HeaderReader
from sphere.ingest.journal import Landed
from sphere.ingest.records import MemberRecord
from sphere.ingest.storage import open_storage
from sphere.jobs.headers import TASK_MEMBERS, in_tasks
from sphere.jobs.parquet import INDEXED, FileWriter, statistics
from sphere.jobs.plan import batches
from sphere.jobs.ranges import MAX_RANGE, PREFIX, prefixes
from sphere.jobs.report import Report
from sphere.jobs.synthetic import ct_series
from tests.support.landing import archive, land, new_member, slices

pytestmark = pytest.mark.unit


class Counting:
    """A storage of one file that counts its reads."""

    def __init__(self, url: str, data: bytes) -> None:
        self.url = url
        self.data = data
        self.reads: list[tuple[int, int]] = []

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        assert length is not None
        self.reads.append((offset, length))
        return self.data[offset : offset + length]


@pytest.mark.parametrize(
    ("scheme", "members", "reads"),
    [
        ("file", [(512, 1000), (2048, 1000)], [(512, 2536)]),  # neighbours
        ("file", [(0, 1000), (100_000, 1000)], [(0, 1000), (100_000, 1000)]),  # far from each other for a disk
        ("hdfs", [(0, 1000), (100_000, 1000)], [(0, 101_000)]),  # near enough for HDFS
        ("file", [(0, 500_000), (500_000, 500_000)], [(0, PREFIX), (500_000, PREFIX)]),  # only their beginnings
        ("file", [(2048, 10), (512, 10)], [(2048, 10), (512, 10)]),  # not in ascending order
        ("file", [(0, 0)], [(0, 0)]),
    ],
)
def test_neighbours_come_in_one_read(scheme: str, members: list[tuple[int, int]], reads: list[tuple[int, int]]) -> None:
    storage: Any = Counting(f"{scheme}:///x", bytes(range(256)) * 4000)
    found = list(prefixes(storage, [("b", offset, length) for offset, length in members]))
    assert storage.reads == reads
    for (prefix, fetch), (offset, length) in zip(found, members, strict=True):
        assert prefix == storage.data[offset : offset + min(length, PREFIX)]
        assert fetch(3, 10**9) == storage.data[offset + 3 : offset + length]


def test_a_read_stays_bounded() -> None:
    storage: Any = Counting("file:///x", b"")
    list(prefixes(storage, [("b", number * PREFIX, PREFIX) for number in range(3 * MAX_RANGE // PREFIX)]))
    assert len(storage.reads) == 3
    assert max(length for _, length in storage.reads) == MAX_RANGE


def test_statistics_are_bounds() -> None:
    long = "9" * 100
    moment = datetime(2026, 1, 2, 3, 4, 5, 678_901, tzinfo=timezone.utc)
    rows = pa.table(
        {
            "text": ["a", long, None],
            "day": pa.array([date(2020, 1, 2), None, date(2021, 3, 4)]),
            "when": pa.array([moment, moment, moment], pa.timestamp("us", tz="UTC")),
            "number": [3, 1, 2],
            "list": [["x"], None, []],
            "nothing": pa.nulls(3, pa.string()),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, row_group_size=2)
    found = orjson.loads(statistics(rows, pq.read_metadata(pa.BufferReader(sink.getvalue()))))
    assert found["numRecords"] == 3
    assert found["nullCount"] == {"text": 1, "day": 1, "when": 0, "number": 0, "list": 1, "nothing": 3}
    low, high = found["minValues"], found["maxValues"]
    assert low.keys() == high.keys() == {"text", "day", "when", "number"}
    assert (low["day"], high["day"], low["number"], high["number"]) == ("2020-01-02", "2021-03-04", 1, 3)
    assert low["text"] == "9" * 64
    assert low["text"] <= long <= high["text"] or high["text"] == "a"
    assert (low["when"], high["when"]) == ("2026-01-02T03:04:05.678Z", "2026-01-02T03:04:05.679Z")


def test_file_writer_puts_one_file(tmp_path: Path) -> None:
    storage = open_storage(tmp_path.as_uri())
    schema = pa.schema([("SOPInstanceUID", pa.string()), ("dataset", pa.string())])
    writer = FileWriter(Table("instances", schema, ("SOPInstanceUID",)))
    for name in ("a", "b"):
        writer.add(pa.RecordBatch.from_pylist([{"SOPInstanceUID": name, "dataset": "{}"}], schema=schema))
    file = writer.finish(storage, "instances")
    written = tmp_path / "instances" / file.path
    assert (writer.rows, file.size) == (2, written.stat().st_size)
    assert pq.read_table(written).column("SOPInstanceUID").to_pylist() == ["a", "b"]


def test_a_file_has_the_columns_that_say_something(tmp_path: Path) -> None:
    """In whichever row group they do; the first of the schema have statistics, and are there, though null."""
    storage = open_storage(tmp_path.as_uri())
    schema = TABLES["instances"].schema
    writer = FileWriter(TABLES["instances"])
    row = dict.fromkeys(("SOPInstanceUID", "StudyInstanceUID", "dataset"), "1")
    for more in ({}, {"KVP": 120.0}, {"ImageType": ["ORIGINAL"], "KVP": 80.0}):
        writer.add(
            pa.RecordBatch.from_pylist([row | more], schema=pa.schema([schema.field(name) for name in row | more]))
        )
    file = writer.finish(storage, "instances")
    parquet = pq.ParquetFile(tmp_path / "instances" / file.path)
    rows = parquet.read()
    assert parquet.num_row_groups == 3
    said = [name for name in schema.names[INDEXED:] if name in ("ImageType", "KVP", "dataset")]
    assert rows.column_names == [*schema.names[:INDEXED], *said]
    assert rows["KVP"].to_pylist() == [None, 120.0, 80.0]
    assert rows["ImageType"].to_pylist() == [None, None, ["ORIGINAL"]]
    assert orjson.loads(file.stats)["nullCount"]["PatientID"] == 3


def _of_study(uid: str) -> MemberRecord:
    """A member of a study, of which nothing else counts here."""
    return MemberRecord(
        bundle="bundles/a.tar",
        offset=0,
        length=1,
        dataset_offset=0,
        SOPInstanceUID="1.2.3",
        SOPClassUID="1.2",
        StudyInstanceUID=uid,
        SeriesInstanceUID="1.2.4",
        TransferSyntaxUID="1.2.840",
        sha256="0" * 64,
        received_at=datetime(2026, 1, 1, tzinfo=timezone.utc),
        source_aet="",
        origin="",
    )


@pytest.mark.parametrize(
    ("studies", "sizes"),
    [
        ([750] * 13 + [250], [5250, 4750]),  # 250 members away is still a twentieth
        ([740] * 13 + [380], [5180, 4820]),
        ([10_000], [5000, 5000]),  # one study, or a cut in the middle of a long one
        ([4000, 2000, 4000], [5000, 5000]),
        ([1, 1], [1, 1]),
        ([3], [2, 1]),
        ([1], [1]),
        ([1000] * 40, [10_000] * 4),
        ([2 * TASK_MEMBERS, 1], [8193, 8193, 8193, 8190]),
    ],
)
def test_tasks_are_cut_between_studies_where_one_is_near(studies: list[int], sizes: list[int]) -> None:
    members = [(_of_study(f"1.2.{number:04}"), False) for number, count in enumerate(studies) for _ in range(count)]
    tasks = in_tasks(members, parallelism=2)
    assert [member for task in tasks for member in task] == members
    assert [len(task) for task in tasks] == sizes


def test_report_adds_up() -> None:
    one = Report(read=5, rows=3, duplicates=1, rejected=1, batches=1, reasons={"EMPTY": 1}, seconds={"plan": 1.0})
    two = Report(read=2, rows=1, updated=1, rejected=1, batches=1, reasons={"EMPTY": 1}, seconds={"plan": 0.5})
    both = one + two
    assert (both.read, both.rows, both.batches, dict(both.reasons)) == (7, 4, 2, {"EMPTY": 2})
    assert str(both) == ("7 read: 4 rows (1 updated), 1 duplicates (0 conflicts), 2 rejected (EMPTY 2); 1.5 s, 5/s")
    assert str(Report(seconds={"lock": 0.04})) == "nothing new to extract (0.0 s)"


@pytest.mark.parametrize(("size", "counts"), [(1, [1] * 7), (3, [3, 3, 1]), (4, [4, 3]), (100, [7])])
def test_batches_cut_bundles_where_they_must(tmp_path: Path, size: int, counts: list[int]) -> None:
    settings = archive(tmp_path)
    files = slices(7)
    for part in (files[:4], files[4:]):
        land(settings, [new_member(data) for data in part])
    landed = Landed(open_storage(settings.storage.root))
    done: dict[str, dict[str, Any]] = {}
    found = []
    for batch in batches(landed, done, size):
        found.append(batch)
    assert [len(batch.records) for batch in found] == counts
    last = {row["bundle"]: row for batch in found for row in batch.bundles}
    assert sorted(row["members"] for row in last.values()) == [3, 4]
    assert all(row["sealed"] for row in last.values())
    assert list(batches(landed, last, size)) == []
    # After a run that died, the next one goes on at any cut.
    done = {row["bundle"]: row for row in found[0].bundles}
    left = [record for batch in batches(landed, done, 100) for record in batch.records]
    assert left == [record for batch in found[1:] for record in batch.records]


def test_synthetic_series_is_a_ct_series() -> None:
    files = list(ct_series(3, rows=16, columns=8, seed=4))
    assert files == list(ct_series(3, rows=16, columns=8, seed=4))
    datasets = [dcmread(io.BytesIO(data)) for data in files]
    assert len({dataset.SOPInstanceUID for dataset in datasets}) == 3
    assert len({dataset.SeriesInstanceUID for dataset in datasets}) == 1
    assert [dataset.InstanceNumber for dataset in datasets] == [1, 2, 3]
    assert [dataset.ImagePositionPatient[2] for dataset in datasets] == [-398.75, -397.5, -396.25]
    for data, dataset in zip(files, datasets, strict=True):
        assert dataset.file_meta.MediaStorageSOPInstanceUID == dataset.SOPInstanceUID
        assert len(dataset) - 1 == 75  # without PixelData
        assert dataset.pixel_array.shape == (16, 8)
        header = HeaderReader(max_header=1 << 20).read(data, size=len(data), fetch=lambda *_: b"")
        assert isinstance(header, Header)
        assert header.warnings == []


def test_synthetic_series_of_a_study() -> None:
    first, second, alone = (dcmread(io.BytesIO(next(ct_series(1, rows=4, columns=4, **which)))) for which in WHICH)
    assert first.StudyInstanceUID == second.StudyInstanceUID != alone.StudyInstanceUID
    assert first.PatientID == second.PatientID
    assert first.SeriesInstanceUID != second.SeriesInstanceUID


WHICH: list[dict[str, int]] = [{"seed": 1, "study": 9}, {"seed": 2, "study": 9}, {"seed": 3}]
