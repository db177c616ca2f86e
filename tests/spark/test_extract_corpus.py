"""Real files from import to the tables, on local disk and on HDFS: nothing is lost, nothing is altered."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from sphere.conf.errors import RejectReason
from sphere.conf.settings import Settings
from sphere.ingest.bundle import BundleWriter
from sphere.ingest.header import identify
from sphere.ingest.header.columns import COLUMNS
from sphere.ingest.media import import_files
from sphere.ingest.records import MemberRecord
from sphere.ingest.storage import Storage, open_storage
from sphere.jobs.extract import run
from sphere.jobs.report import Report
from tests.conftest import CORPUS
from tests.support.headers import packaged_files, pydicom_dataset, typed_differences
from tests.support.landing import archive, slices, table_rows

pytestmark = [pytest.mark.spark, pytest.mark.filterwarnings("ignore")]  # pydicom complains of the broken files

Place = tuple[str, int]


@dataclass(frozen=True)
class Extracted:
    """An archive with everything in it, and where each file went."""

    settings: Settings
    storage: Storage
    members: dict[Path, MemberRecord]
    report: Report
    rows: dict[Place, dict[str, Any]]
    quarantine: dict[Place, dict[str, Any]]


@pytest.fixture(scope="module", params=["file", pytest.param("hdfs", marks=pytest.mark.hdfs)])
def extracted(
    request: pytest.FixtureRequest, spark: SparkSession, tmp_path_factory: pytest.TempPathFactory
) -> Extracted:
    """The corpus where there is one, pydicom's packaged files and a generated series: imported, then extracted."""
    folder = tmp_path_factory.mktemp(f"corpus-{request.param}")
    root = "file:storage"
    if request.param == "hdfs":
        root = f"{request.getfixturevalue('hdfs_cluster').hdfs_url}/corpus"
    settings = archive(folder, storage={"root": root})
    made = folder / "made"
    made.mkdir()
    for number, data in enumerate(slices(20)):
        (made / f"{number:03}.dcm").write_bytes(data)
    paths = [*sorted(path for path in CORPUS.rglob("*") if path.is_file()), *packaged_files(), made]
    storage = open_storage(settings.storage.root)
    writer = BundleWriter(storage, settings)
    try:
        results = list(import_files(paths, writer, memory_bytes=1 << 20))
    finally:
        writer.close()
    assert [result for result in results if result.record is None] == []
    report = run(spark, settings)
    return Extracted(
        settings,
        storage,
        {result.path: result.record for result in results if result.record},
        report,
        {_place(row): row for row in table_rows(settings, "instances")},
        {_place(row): row for row in table_rows(settings, "quarantine")},
    )


def _place(row: dict[str, Any]) -> Place:
    return row["bundle"], row["offset"]


def test_every_member_is_a_row_a_copy_or_quarantined_with_a_reason(extracted: Extracted) -> None:
    by_uid = {row["SOPInstanceUID"]: row for row in extracted.rows.values()}
    settled = {row["other_sha256"] for row in table_rows(extracted.settings, "conflicts")}
    reasons = {reason.value for reason in RejectReason} - {RejectReason.INTERNAL.value}
    copies = 0
    for path, record in extracted.members.items():
        place = record.bundle, record.offset
        assert not (place in extracted.rows and place in extracted.quarantine), path
        if place in extracted.quarantine:
            assert extracted.quarantine[place]["reason"] in reasons, path
        elif place not in extracted.rows:
            copies += 1
            assert record.sha256 in {by_uid[record.SOPInstanceUID]["sha256"], *settled}, path
    counts = extracted.report.rows, extracted.report.rejected, extracted.report.duplicates
    assert counts == (len(extracted.rows), len(extracted.quarantine), copies)
    assert extracted.report.read == len(extracted.members) == sum(counts)


def test_typed_columns_equal_pydicom(extracted: Extracted) -> None:
    differences = []
    for path, record in extracted.members.items():
        row = extracted.rows.get((record.bundle, record.offset))
        if row is None or "rtplan_truncated" in path.name:  # pydicom gives a value that the end of the file cuts
            continue
        values = {name: value for name, value in row.items() if value is not None}
        differences += [f"{path.name}: {text}" for text in typed_differences(values, pydicom_dataset(path), COLUMNS)]
    assert differences == []


def test_datasets_are_the_bytes_that_came(extracted: Extracted) -> None:
    for path, record in extracted.members.items():
        data = path.read_bytes()
        stored = extracted.storage.read(record.bundle, record.offset, record.length)
        dataset = stored[record.dataset_offset :]
        assert dataset == data[identify(data, size=len(data)).dataset_offset :] or dataset == data, path
        assert hashlib.sha256(dataset).hexdigest() == record.sha256, path
        row = extracted.rows.get((record.bundle, record.offset))
        if row is not None:
            assert row["sha256"] == record.sha256
            _check_pixel_offset(row, stored)


def _check_pixel_offset(row: dict[str, Any], stored: bytes) -> None:
    if row["pixel_offset"] is not None:
        tag = stored[row["pixel_offset"] : row["pixel_offset"] + 4]
        assert tag in (b"\xe0\x7f\x10\0", b"\x7f\xe0\0\x10", b"\xe0\x7f\x08\0", b"\xe0\x7f\x09\0"), row["origin"]


def test_again_changes_nothing(extracted: Extracted, spark: SparkSession) -> None:
    assert run(spark, extracted.settings).read == 0


def test_spark_reads_what_was_written(extracted: Extracted, spark: SparkSession) -> None:
    from sphere.jobs.session import register_tables

    register_tables(spark, extracted.settings)
    counted = spark.sql("SELECT count(*) AS n, count(DISTINCT SOPInstanceUID) AS uids FROM instances").collect()[0]
    assert (counted["n"], counted["uids"]) == (len(extracted.rows), len(extracted.rows))
    summed = spark.sql("SELECT sum(NumberOfStudyRelatedInstances) AS n FROM studies").collect()[0]
    assert summed["n"] == len(extracted.rows)
    # Statistics of files written by our own tasks: a filter must find the same rows as without skipping files.
    for column in ("StudyInstanceUID", "StudyDate", "received_at", "bundle"):
        value = max(row[column] for row in extracted.rows.values() if row[column] is not None)
        expected = sum(row[column] == value for row in extracted.rows.values())
        assert spark.table("instances").filter(spark.table("instances")[column] == value).count() == expected, column
