"""Deleted instances leave the tables, whatever was done in between and how often, and come back as they were."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from sphere.catalog import index
from sphere.catalog.query import Query
from sphere.catalog.schema import TABLES
from sphere.catalog.service import QueryService
from sphere.catalog.tombstones import open_tombstones
from sphere.conf.settings import Settings
from sphere.ingest.records import MemberRecord
from sphere.jobs import tombstones
from sphere.jobs.extract import run
from tests.support.catalog import roll_up
from tests.support.landing import (
    all_tables,
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
from tests.support.tombs import delete, restore

pytestmark = pytest.mark.spark

REPLACE: dict[str, Any] = {"ingest": {"on_conflict": "replace"}}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """An archive whose path needs quoting in a URL."""
    return archive(tmp_path / "an archive")


@pytest.fixture(params=["file", pytest.param("hdfs", marks=pytest.mark.hdfs)])
def somewhere(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """One on local disk, one on HDFS."""
    if request.param == "file":
        return archive(tmp_path / "an archive")
    return archive(tmp_path, storage={"root": f"{request.getfixturevalue('hdfs_cluster').hdfs_url}/tombstones"})


def places(rows: Iterable[dict[str, Any]]) -> set[tuple[str, int]]:
    return {(row["bundle"], row["offset"]) for row in rows}


def test_rows_leave_with_their_roll_ups(spark: SparkSession, somewhere: Settings) -> None:
    settings = somewhere
    first, second = slices(3, seed=1), slices(2, seed=2, study=1)
    land(settings, [new_member(data, second=i) for i, data in enumerate([*first, *second])])
    run(spark, settings)
    before = by_uid(settings)
    gone = [new_member(data).SOPInstanceUID for data in (first[0], *second)]
    delete(settings, gone, reason="consent withdrawn")
    report = run(spark, settings)
    assert (report.deleted, report.read, report.rows) == (3, 0, 0)
    assert by_uid(settings).keys() == before.keys() - set(gone)
    assert [row["NumberOfStudyRelatedInstances"] for row in table_rows(settings, "studies")] == [2]
    assert [row["NumberOfSeriesRelatedInstances"] for row in table_rows(settings, "series")] == [2]
    rows = {row["SOPInstanceUID"]: row for row in table_rows(settings, "tombstones")}
    assert rows.keys() == set(gone)
    for uid, row in rows.items():
        assert {row[name] == before[uid][name] for name in ("bundle", "offset", "length", "StudyInstanceUID")} == {True}
        assert (row["reason"], row["deleted_by"]) == ("consent withdrawn", "test")
    assert not tombstones.waiting(settings)
    restore(settings, gone)
    assert tombstones.waiting(settings)
    report = run(spark, settings)
    assert (report.deleted, report.read, report.restored, report.rows) == (0, 3, 3, 3)
    assert by_uid(settings) == before
    assert table_rows(settings, "tombstones") == []


def test_answers_before_and_after_the_tables_follow(
    spark: SparkSession, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden from the moment of deletion; what left the tables is shown again by the extraction after its restoring."""
    monkeypatch.setattr(index, "REFRESH_WAIT_S", 60.0)
    land(settings, [new_member(data, second=i) for i, data in enumerate(slices(3))])
    run(spark, settings)
    uids = sorted(by_uid(settings))
    counted = Query.build("STUDY", return_keys=["NumberOfStudyRelatedInstances"])

    def seen(service: QueryService) -> tuple[list[str], list[int]]:
        found = sorted(one.SOPInstanceUID for one in service.lookup_instances())
        return found, [int(one.identifier().NumberOfStudyRelatedInstances) for one in service.find(counted)]

    with QueryService(settings) as service:
        assert seen(service) == (uids, [3])
        delete(settings, uids[:2])
        assert seen(service) == (uids[2:], [1])
        run(spark, settings)
        assert seen(service) == (uids[2:], [1])
        restore(settings, uids[:1])
        assert seen(service) == (uids[2:], [1])
        run(spark, settings)
        assert seen(service) == (sorted([uids[0], uids[2]]), [2])
        delete(settings, [uids[0], uids[2]])
        run(spark, settings)
        assert seen(service) == ([], [])


def test_the_last_instance_leaves_empty_tables(spark: SparkSession, settings: Settings) -> None:
    land(settings, [new_member(data, second=i) for i, data in enumerate(slices(2))])
    run(spark, settings)
    delete(settings, by_uid(settings))
    assert run(spark, settings).deleted == 2
    for name in ("instances", "series", "studies", "patients"):
        assert table_rows(settings, name) == []
    land(settings, [new_member(slices(1, seed=7)[0])])
    assert run(spark, settings).rows == 1
    assert [row["NumberOfPatientRelatedInstances"] for row in table_rows(settings, "patients")] == [1]


@pytest.mark.parametrize("policy", ["keep-first", "replace"])
def test_deleted_and_restored_is_as_before(spark: SparkSession, tmp_path: Path, policy: str) -> None:
    """Conflicts, contradictions and quarantine too, at once or in small batches; and running twice changes nothing."""
    settings = archive(tmp_path / "an archive", ingest={"on_conflict": policy}, extract={"batch": 4})
    mixture(settings)
    other = changed(slices(1, seed=9, study=3)[0], PatientID="OTHER")
    land(settings, [new_member(slices(2, seed=9, study=3)[1], second=20), new_member(other, second=21)])
    run(spark, settings)
    before = all_tables(settings)
    uids = {row["SOPInstanceUID"] for name in ("instances", "quarantine") for row in before[name]} - {""}
    delete(settings, sorted(uids))
    run(spark, settings)
    gone = all_tables(settings)
    assert not gone["instances"] and not gone["studies"] and not gone["conflicts"]
    assert {row["SOPInstanceUID"] for row in gone["quarantine"]} <= {""}
    assert run(spark, settings).deleted == 0
    assert all_tables(settings) == gone
    restore(settings, sorted(uids))
    report = run(spark, settings)
    assert report.read == report.restored == len(gone["tombstones"])
    assert report.read == report.rows + report.duplicates + report.rejected
    assert all_tables(settings) == before
    assert run(spark, settings).read == 0
    assert all_tables(settings) == before


@pytest.mark.parametrize("size", [1, 100])
def test_before_or_after_extraction_is_the_same(spark: SparkSession, tmp_path: Path, size: int) -> None:
    """What was deleted before any batch saw it, and what had rows: the same tables, but for copies."""
    settings = archive(tmp_path / "landed", **REPLACE)
    mixture(settings)
    early = copy_of(settings, tmp_path / "early", **REPLACE, extract={"batch": size})
    late = copy_of(settings, tmp_path / "late", **REPLACE, extract={"batch": size})
    run(spark, late)
    uids = sorted(by_uid(late))[:3]
    delete(late, uids)
    run(spark, late)
    delete(early, uids, like=late)
    report = run(spark, early)
    assert report.read == report.rows + report.duplicates + report.rejected
    assert report.deleted == len(table_rows(early, "tombstones"))
    found, expected = all_tables(early), all_tables(late)
    assert places(expected.pop("tombstones")) <= places(found.pop("tombstones"))
    assert found == expected


def test_what_comes_again_stays_deleted(spark: SparkSession, settings: Settings) -> None:
    data = slices(1)[0]
    land(settings, [new_member(data)])
    run(spark, settings)
    [uid] = by_uid(settings)
    delete(settings, [uid])
    corrected = changed(data, PatientComments="corrected")
    land(settings, [new_member(data, second=5), new_member(corrected, second=6)])
    report = run(spark, settings)
    assert (report.read, report.rows, report.deleted) == (0, 0, 3)
    assert table_rows(settings, "instances") == table_rows(settings, "conflicts") == []
    assert len(table_rows(settings, "tombstones")) == 3
    assert [row["members"] for row in table_rows(settings, "bundles")] == [1, 2]
    restore(settings, [uid])
    report = run(spark, settings)
    assert (report.read, report.rows, report.duplicates, report.conflicts) == (3, 1, 2, 1)
    assert by_uid(settings)[uid]["PatientComments"] is None
    assert table_rows(settings, "tombstones") == []


def test_a_journal_without_uids_is_told_by_the_header(spark: SparkSession, settings: Settings) -> None:
    files = slices(2)
    members = [new_member(data, second=i) for i, data in enumerate(files)]
    land(settings, members)
    run(spark, settings)
    uid = members[0].SOPInstanceUID
    delete(settings, [uid])
    [nameless] = land(settings, [_nameless(new_member(files[0], second=9))])
    report = run(spark, settings)
    assert (report.read, report.rows, report.deleted) == (0, 0, 2)
    assert place_of(nameless) in places(table_rows(settings, "tombstones"))
    restore(settings, [uid])
    report = run(spark, settings)
    assert (report.read, report.rows, report.duplicates) == (2, 1, 1)
    assert (by_uid(settings)[uid]["received_at"]) == members[0].received_at


def _nameless(member: Any) -> Any:
    blank = dict.fromkeys(("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID"), "")
    return type(member)(**{**{name: getattr(member, name) for name in member.__dataclass_fields__}, **blank})


def place_of(record: MemberRecord) -> tuple[str, int]:
    return record.bundle, record.offset


def test_deleted_and_restored_between_two_extractions_is_nothing(spark: SparkSession, settings: Settings) -> None:
    land(settings, [new_member(data, second=i) for i, data in enumerate(slices(3))])
    run(spark, settings)
    before = all_tables(settings)
    delete(settings, list(by_uid(settings))[:2])
    restore(settings, list(by_uid(settings))[:1])
    restore(settings, list(by_uid(settings))[1:2])
    assert tombstones.waiting(settings)
    report = run(spark, settings)
    assert (report.read, report.deleted) == (0, 0)
    assert all_tables(settings) == before
    assert not tombstones.waiting(settings)


def test_another_host_follows_from_the_beginning(spark: SparkSession, settings: Settings, tmp_path: Path) -> None:
    """How far a host has followed is its own; what was done already is found done."""
    land(settings, [new_member(data, second=i) for i, data in enumerate(slices(3))])
    run(spark, settings)
    uids = list(by_uid(settings))
    delete(settings, uids[:2])
    run(spark, settings)
    restore(settings, uids[:1])
    other = settings.model_copy(
        update={"archive": settings.archive.model_copy(update={"state_dir": tmp_path / "other host"})}
    )
    assert run(spark, other).restored == 1
    after = all_tables(settings)
    assert by_uid(settings).keys() == {uids[0], uids[2]}
    for one in (settings, other):
        assert (run(spark, one).read, run(spark, one).deleted) == (0, 0)
        assert all_tables(one) == after


def test_a_catalog_made_anew_has_no_deleted_rows(spark: SparkSession, settings: Settings, tmp_path: Path) -> None:
    land(settings, [new_member(data, second=i) for i, data in enumerate(slices(3))])
    run(spark, settings)
    uid = next(iter(by_uid(settings)))
    delete(settings, [uid])
    run(spark, settings)
    anew = settings.model_copy(
        update={"catalog": settings.catalog.model_copy(update={"root": (tmp_path / "anew").as_uri()})}
    )
    run(spark, anew)
    for name in TABLES:
        assert table_rows(anew, name) == table_rows(settings, name), name
    restore(settings, [uid])
    for one in (anew, settings):
        run(spark, one)
        assert uid in by_uid(one)
        assert table_rows(one, "tombstones") == []


def test_roll_ups_after_a_deletion_equal_a_plain_computation(spark: SparkSession, settings: Settings) -> None:
    mixture(settings)
    run(spark, settings)
    delete(settings, sorted(by_uid(settings))[::2])
    run(spark, settings)
    instances, studies = table_rows(settings, "instances"), table_rows(settings, "studies")
    for name, source in (("series", instances), ("studies", instances), ("patients", studies)):
        expected, found = roll_up(TABLES[name].roll_up, source), table_rows(settings, name)
        names = [column for column in TABLES[name].schema.names if column != "patient_key" or name == "patients"]
        assert [[row[column] for column in names] for row in sorted(found, key=str)] == [
            [row[column] for column in names] for row in sorted(expected, key=str)
        ], name


def test_nobody_deleted_anything(spark: SparkSession, settings: Settings) -> None:
    """No table, no folder, no cache."""
    land(settings, [new_member(slices(1)[0])])
    assert run(spark, settings).deleted == 0
    assert not tombstones.waiting(settings)
    root = settings.archive.state_dir.parent
    assert not list(root.rglob("*tombstones*"))
    with closing(open_tombstones(settings)) as nothing:
        assert nothing.count() == 0
