"""Extraction: what lands becomes rows, once, whatever the order, the batches and the number of runs."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable
from pyspark.sql import SparkSession

from sphere.catalog.lock import CatalogLock
from sphere.catalog.schema import TABLES
from sphere.conf.errors import JobFailed, LockHeld
from sphere.conf.settings import Settings
from sphere.jobs import extract, headers
from sphere.jobs.extract import run
from sphere.jobs.session import register_tables
from tests.support.catalog import roll_up
from tests.support.landing import (
    all_tables,
    annotate,
    archive,
    by_uid,
    changed,
    copy_of,
    land,
    mixture,
    new_member,
    slices,
    table_rows,
)

pytestmark = pytest.mark.spark


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """An archive whose path needs quoting in a URL."""
    return archive(tmp_path / "an archive")


def test_new_instances_become_rows(spark: SparkSession, settings: Settings) -> None:
    records = land(settings, [new_member(data, second=i) for i, data in enumerate(slices(5))])
    report = run(spark, settings)
    assert (report.read, report.rows, report.duplicates, report.rejected, report.batches) == (5, 5, 0, 0, 1)
    rows = by_uid(settings)
    for record in records:
        row = rows[record.SOPInstanceUID]
        assert (row["bundle"], row["offset"], row["length"]) == (record.bundle, record.offset, record.length)
        assert (row["sha256"], row["received_at"]) == (record.sha256, record.received_at)
        assert row["dataset_offset"] == record.dataset_offset
    assert [row["NumberOfSeriesRelatedInstances"] for row in table_rows(settings, "series")] == [5]


def test_second_run_changes_nothing(spark: SparkSession, settings: Settings) -> None:
    mixture(settings)
    run(spark, settings)
    before = all_tables(settings)
    report = run(spark, settings)
    assert report.read == report.batches == 0
    assert all_tables(settings) == before


@pytest.mark.parametrize(("policy", "size"), [("keep-first", 3), ("replace", 1)])
def test_batches_do_not_matter(spark: SparkSession, settings: Settings, tmp_path: Path, policy: str, size: int) -> None:
    total = mixture(settings)
    ingest = {"on_conflict": policy}
    whole = copy_of(settings, tmp_path / "whole", ingest=ingest)
    single = copy_of(settings, tmp_path / "single", ingest=ingest, extract={"batch": size})
    report = run(spark, whole)
    assert (report.read, report.batches) == (total, 1)
    assert report.read == report.rows + report.duplicates + report.rejected
    assert run(spark, single).batches == -(-total // size)
    expected, found = all_tables(whole), all_tables(single)
    for name in TABLES:
        assert found[name] == expected[name], name


@pytest.mark.parametrize(("policy", "comments"), [("reject", None), ("replace", "corrected again")])
def test_conflicts_follow_the_policy(spark: SparkSession, tmp_path: Path, policy: str, comments: str | None) -> None:
    settings = archive(tmp_path, ingest={"on_conflict": policy})
    mixture(settings)
    report = run(spark, settings)
    uid = slices(1, seed=1)[0]
    row = by_uid(settings)[new_member(uid).SOPInstanceUID]
    assert row["PatientComments"] == comments
    settled = [found for found in table_rows(settings, "conflicts") if found["SOPInstanceUID"] == row["SOPInstanceUID"]]
    assert len(settled) == 2
    assert {found["decision"] for found in settled} == {policy}
    if policy == "reject":
        assert {found["kept_sha256"] for found in settled} == {row["sha256"]}
    else:
        assert settled[-1]["kept_sha256"] == row["sha256"]
    assert report.conflicts == len(table_rows(settings, "conflicts")) == 3


def test_contradictions_are_recorded_once(spark: SparkSession, settings: Settings) -> None:
    first, second, third = slices(3)
    land(settings, [new_member(first, second=0), new_member(changed(second, PatientID="OTHER"), second=1)])
    run(spark, settings)
    land(settings, [new_member(changed(third, Modality="MR"), second=2)])
    report = run(spark, settings)
    found = table_rows(settings, "conflicts")
    assert {row["kind"] for row in found} == {"STUDY_PATIENT", "SERIES_MODALITY"}
    assert {row["decision"] for row in found} == {"recorded"}
    assert (report.rows, report.conflicts) == (1, 0)  # both are shown
    assert run(spark, settings).read == 0
    assert table_rows(settings, "conflicts") == found


def test_replaced_row_leaves_its_series(spark: SparkSession, tmp_path: Path) -> None:
    settings = archive(tmp_path, ingest={"on_conflict": "replace"})
    original = slices(1)[0]
    land(settings, [new_member(original, second=0)])
    run(spark, settings)
    moved = changed(original, SeriesInstanceUID="1.2.3.4", StudyInstanceUID="1.2.3", PatientID="OTHER")
    land(settings, [new_member(moved, second=1)])
    report = run(spark, settings)
    assert (report.rows, report.updated, report.conflicts) == (1, 1, 1)
    assert [row["SeriesInstanceUID"] for row in table_rows(settings, "series")] == ["1.2.3.4"]
    assert [row["StudyInstanceUID"] for row in table_rows(settings, "studies")] == ["1.2.3"]
    assert [row["PatientID"] for row in table_rows(settings, "patients")] == ["OTHER"]


def test_a_batch_touches_the_files_that_it_must(spark: SparkSession, tmp_path: Path) -> None:
    """Files that leave the tables are those that hold a study which the batch changes, and no other."""
    settings = archive(tmp_path, ingest={"on_conflict": "replace"})
    studies = [slices(1, seed=number) for number in range(5)]
    for number, files in enumerate(studies[:4]):
        land(settings, [new_member(data, second=number) for data in files])
        run(spark, settings)
    grown = ("instances", "series", "studies", "patients")
    before = {name: _files(settings, name) for name in grown}
    assert {name: len(files) for name, files in before.items()} == dict.fromkeys(grown, 4)

    land(settings, [new_member(data, second=10) for data in studies[4]])
    run(spark, settings)  # a new study: nothing is written anew
    assert {name: len(before[name] - _files(settings, name)) for name in grown} == dict.fromkeys(grown, 0)

    before = {name: _files(settings, name) for name in grown}
    replaced = [changed(studies[n][0], SeriesDescription="sent again") for n in (0, 2)]
    land(settings, [new_member(data, second=20) for data in replaced])
    assert run(spark, settings).updated == 2
    assert {name: len(before[name] - _files(settings, name)) for name in grown} == dict.fromkeys(grown, 2)


def _files(settings: Settings, name: str) -> set[str]:
    return set(DeltaTable(f"{settings.catalog_root}/{name}").file_uris())


def test_same_bytes_again_are_duplicates(spark: SparkSession, settings: Settings) -> None:
    files = slices(3)
    land(settings, [new_member(data, second=i) for i, data in enumerate(files)])
    run(spark, settings)
    before = all_tables(settings)
    land(settings, [new_member(data, second=100 + i) for i, data in enumerate(files)])
    report = run(spark, settings)
    assert (report.read, report.rows, report.duplicates, report.conflicts) == (3, 0, 3, 0)
    after = all_tables(settings)
    assert len(after.pop("bundles")) == len(before.pop("bundles")) + 1
    assert after == before


def test_rejected_members_are_quarantined_with_a_reason(spark: SparkSession, settings: Settings) -> None:
    good = slices(1)[0]
    land(settings, [new_member(data, second=i) for i, data in enumerate([b"", b"text" * 99, good[:600], good])])
    report = run(spark, settings)
    assert (report.rows, report.rejected) == (1, 3)
    rows = table_rows(settings, "quarantine")
    assert {row["reason"] for row in rows} == set(report.reasons)
    assert all(row["detail"] is not None and row["bundle"] and row["length"] is not None for row in rows)


def test_journal_without_uids_is_settled_by_the_header(spark: SparkSession, settings: Settings) -> None:
    files = slices(2)
    blank = {"SOPInstanceUID": "", "StudyInstanceUID": "", "SeriesInstanceUID": "", "SOPClassUID": ""}
    members = [new_member(data, second=i) for i, data in enumerate(files)]
    nameless = [type(members[0])(**{**_fields(member), **blank}) for member in members]
    land(settings, nameless)
    assert run(spark, settings).rows == 2
    before = by_uid(settings)
    land(settings, members)
    report = run(spark, settings)
    assert (report.rows, report.duplicates) == (0, 2)
    assert by_uid(settings) == before


def _fields(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


def test_roll_ups_equal_a_plain_computation(spark: SparkSession, tmp_path: Path) -> None:
    settings = archive(tmp_path, extract={"batch": 4})
    mixture(settings)
    land(settings, [new_member(changed(slices(1, seed=8)[0], PatientID="", Modality="MR"), second=50)])
    run(spark, settings)
    instances = table_rows(settings, "instances")
    studies = table_rows(settings, "studies")
    for name, source in (("series", instances), ("studies", instances), ("patients", studies)):
        expected = roll_up(TABLES[name].roll_up, source)
        found = table_rows(settings, name)
        if name == "studies":
            found = [{column: row[column] for column in row if column != "patient_key"} for row in found]
        assert sorted(found, key=str) == sorted(_like(found, expected), key=str), name


def _like(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{column: row[column] for column in found[0]} for row in expected]


def test_an_open_bundle_is_read_on(spark: SparkSession, settings: Settings) -> None:
    from sphere.ingest.bundle import BundleWriter
    from sphere.ingest.storage import open_storage

    writer = BundleWriter(open_storage(settings.storage.root), settings)
    files = slices(3)
    try:
        writer.store(new_member(files[0]))
        assert run(spark, settings).rows == 1
        assert [(row["members"], row["sealed"]) for row in table_rows(settings, "bundles")] == [(1, False)]
        writer.store(new_member(files[1], second=1))
        writer.store(new_member(files[2], second=2))
        assert run(spark, settings).rows == 2
    finally:
        writer.close()
    assert run(spark, settings).read == 0
    assert [(row["members"], row["sealed"]) for row in table_rows(settings, "bundles")] == [(3, True)]


def test_second_run_names_the_first(spark: SparkSession, settings: Settings) -> None:
    land(settings, [new_member(slices(1)[0])])
    with CatalogLock(settings, job="extract"), pytest.raises(LockHeld, match="written by extract"):
        run(spark, settings)
    assert run(spark, settings).rows == 1


def test_second_run_waits_for_the_first(spark: SparkSession, tmp_path: Path) -> None:
    settings = archive(tmp_path, extract={"lock_wait_s": 60})
    land(settings, [new_member(data) for data in slices(2)])
    holding, release = threading.Event(), threading.Event()
    reports = []

    def stop_after_plan(name: str, *_: object) -> None:
        if name == "headers":
            holding.set()
            release.wait(60)

    first = threading.Thread(target=lambda: reports.append(run(spark, settings, on_step=stop_after_plan)))
    first.start()
    assert holding.wait(60)
    second = threading.Thread(target=lambda: reports.append(run(spark, settings)))
    second.start()
    release.set()
    first.join()
    second.join()
    assert [report.rows for report in reports] == [2, 0]


def test_jobs_of_one_plan_each_have_their_own_members(spark: SparkSession, tmp_path: Path) -> None:
    """The plan of a job is made once for a session and says nothing of its members: not even two at once mix them."""
    archives = [archive(tmp_path / name) for name in ("one", "two", "three")]
    for number, settings in enumerate(archives):
        land(settings, [new_member(data) for data in slices(4 + number)[number:]])
    run(spark, archives[0])
    planned = headers._frame.cache_info().misses
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda settings: run(spark, settings), archives[1:]))
    assert [report.rows for report in reports] == [4, 4]
    assert headers._frame.cache_info().misses == planned
    for settings in archives:
        assert len(by_uid(settings)) == 4
    assert not list(tmp_path.rglob("*.members"))


def test_a_commit_of_another_writer_is_not_written_over(
    spark: SparkSession, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even a process that lost its lock without noticing: its rows must not stand beside those of the other."""
    land(settings, [new_member(data) for data in slices(2)])
    real = extract.read_headers

    def overtaken(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        monkeypatch.setattr(extract, "read_headers", real)
        lock.__exit__(None, None, None)
        run(spark, settings)
        lock.__enter__()
        return found

    taken: list[CatalogLock] = []
    enter = CatalogLock.__enter__
    monkeypatch.setattr(CatalogLock, "__enter__", lambda self: (taken.append(self), enter(self))[1])
    monkeypatch.setattr(extract, "read_headers", overtaken)
    lock = _First(taken)
    with pytest.raises(JobFailed, match="instances was changed by another process"):
        run(spark, settings)
    assert len(by_uid(settings)) == 2


class _First:
    """The lock that was taken first, once there is one."""

    def __init__(self, taken: list[CatalogLock]) -> None:
        self._taken = taken

    def __getattr__(self, name: str) -> Any:
        return getattr(self._taken[0], name)

    def __exit__(self, *args: Any) -> None:
        self._taken[0].__exit__(*args)

    def __enter__(self) -> CatalogLock:
        return self._taken[0].__enter__()


def test_lost_bundle_stops_the_job_and_loses_nothing(spark: SparkSession, settings: Settings) -> None:
    record = land(settings, [new_member(slices(1)[0])])[0]
    tar = settings.archive.state_dir.parent / "storage" / record.bundle
    away = tar.with_suffix(".away")
    tar.rename(away)
    landed = away.read_bytes()
    tar.write_bytes(b"")
    tar.unlink()
    report = run(spark, settings)
    assert report.read == 0  # a journal without its bundle is not taken for one
    tar.write_bytes(landed)
    assert run(spark, settings).rows == 1


def test_steps_are_told_in_order(spark: SparkSession, tmp_path: Path) -> None:
    settings = archive(tmp_path, ingest={"on_conflict": "replace"})
    mixture(settings)
    names: list[str] = []
    report = run(spark, settings, on_step=lambda name, *_: names.append(name))
    assert list(dict.fromkeys(names)) == list(extract.STEPS)
    assert list(report.seconds) == list(extract.STEPS)


def test_tables_are_made_for_old_and_new_readers(spark: SparkSession, settings: Settings) -> None:
    land(settings, [new_member(data) for data in slices(2)])
    run(spark, settings)
    detail = spark.sql(f"DESCRIBE DETAIL delta.`{settings.archive.state_dir.parent}/storage/catalog/instances`")
    row = detail.collect()[0]
    assert row["minReaderVersion"] == 1
    assert row["properties"]["delta.enableChangeDataFeed"] == "true"
    assert row["properties"]["delta.dataSkippingNumIndexedCols"] == "32"


def test_change_feed_adds_up_to_the_table(spark: SparkSession, tmp_path: Path) -> None:
    settings = archive(tmp_path, ingest={"on_conflict": "replace"}, extract={"batch": 5})
    mixture(settings)
    run(spark, settings)
    location = f"{settings.archive.state_dir.parent}/storage/catalog/instances"
    feed = spark.read.format("delta").option("readChangeFeed", "true").option("startingVersion", 0).load(location)
    left: dict[str, int] = {}
    for row in feed.select("SOPInstanceUID", "sha256", "_change_type").collect():
        step = {"insert": 1, "delete": -1}[row["_change_type"]]
        left[row["SOPInstanceUID"] + row["sha256"]] = left.get(row["SOPInstanceUID"] + row["sha256"], 0) + step
    expected = {uid + row["sha256"] for uid, row in by_uid(settings).items()}
    assert {key: count for key, count in left.items() if count} == dict.fromkeys(expected, 1)


def test_annotations_are_joined_with_studies(spark: SparkSession, settings: Settings) -> None:
    [record] = land(settings, [new_member(slices(1)[0])])
    id = annotate(settings, record.StudyInstanceUID)
    run(spark, settings)
    register_tables(spark, settings)
    found = spark.sql(
        "SELECT a.id, a.version, s.PatientID FROM studies s JOIN annotations a USING (StudyInstanceUID) "
        "WHERE a.state = 'current'"
    ).collect()
    assert [(row.id, row.version) for row in found] == [(id, 2)]


def test_collections_are_columns(spark: SparkSession, settings: Settings) -> None:
    first, second, third = slices(3)
    tagged = [replace(new_member(first), collections=("b", "a")), replace(new_member(second), collections=("b",))]
    land(settings, [*tagged, new_member(third)])
    run(spark, settings)
    rows = table_rows(settings, "instances")
    assert sorted(row["collections"] or [] for row in rows) == [[], ["b"], ["b", "a"]]
    for name in ("series", "studies", "patients"):
        assert [row["collections"] for row in table_rows(settings, name)] == [["a", "b"]]
