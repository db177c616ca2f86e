"""Compaction: what was deleted is found nowhere any more, everything else is where and what it was."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import orjson
import pytest
from deltalake import DeltaTable
from pyspark.sql import SparkSession

from sphere.catalog.lock import CatalogLock
from sphere.catalog.query import Query
from sphere.catalog.service import QueryService
from sphere.catalog.tombstones import open_tombstones
from sphere.conf.errors import BytesGone, CatalogError, LockHeld, SettingsError
from sphere.conf.settings import Settings, Snapshot
from sphere.ingest.journal import Landed
from sphere.ingest.records import MemberRecord
from sphere.ingest.recovery import rebuild_journal, recover, verify
from sphere.ingest.storage import Storage, open_storage
from sphere.jobs import compact, tombstones
from sphere.jobs.compact import SHOWN, UNCATALOGUED, YOUNG
from sphere.jobs.extract import run
from sphere.jobs.tables import Tables
from sphere.status import take
from tests.support.landing import all_tables, archive, by_uid, changed, land, new_member, slices, table_rows
from tests.support.tombs import delete, restore

pytestmark = pytest.mark.spark

NOW = timedelta()
NAME, PIXELS = "MARKER^PATIENT", b"\xfe\x5aMARKER-PIXELS"


def marked(data: bytes, comment: str = "") -> bytes:
    """A file with a name and pixel data that are to be found nowhere."""
    found = changed(data, PatientName=NAME, PatientID="MARKER-ID", PatientComments=comment)
    return found[: -len(PIXELS)] + PIXELS


@pytest.fixture(
    params=["file", pytest.param("hdfs", marks=pytest.mark.hdfs), pytest.param("web", marks=pytest.mark.hdfs)]
)
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """An archive on local disk, on HDFS, or with its bundles on HDFS over HTTP."""
    if request.param == "file":
        return archive(tmp_path / "an archive")
    cluster = request.getfixturevalue("hdfs_cluster")
    if request.param == "hdfs":
        return archive(tmp_path, storage={"root": f"{cluster.hdfs_url}/compact"})
    return archive(tmp_path, storage={"root": f"{cluster.webhdfs_url}/compact-web"}, catalog={"root": "file:catalog"})


@pytest.fixture
def local(tmp_path: Path) -> Settings:
    return archive(tmp_path / "an archive")


def storage_of(settings: Settings) -> Storage:
    return open_storage(settings.storage.root, user=settings.storage.user)


def landed(settings: Settings) -> tuple[list[MemberRecord], list[MemberRecord]]:
    """Three members of a patient who will withdraw, with a copy and another version, among four of another one; in
    three bundles, one of them with nothing else."""
    theirs = [marked(data) for data in slices(3, seed=1)]
    others = slices(4, seed=2, study=2)
    import_ = {"origin": "import:/cd/MARKER^PATIENT/IM1"}
    first = land(settings, [new_member(others[0]), new_member(theirs[0], **import_), new_member(others[1], second=1)])
    second = land(settings, [new_member(theirs[1], second=2), new_member(theirs[2], second=3)])
    again = [new_member(theirs[0], second=4), new_member(marked(slices(3, seed=1)[1], "corrected"), second=5)]
    third = land(settings, [new_member(others[2], second=6), *again, new_member(others[3], second=7)])
    gone = [first[1], *second, *third[1:3]]
    return gone, [first[0], first[2], third[0], third[3]]


def contents(settings: Settings) -> Iterator[tuple[str, bytes]]:
    """Every file of the storage and the catalog, temporary ones too where that is a folder."""
    for root in {settings.storage.root, settings.catalog_root}:
        if urlsplit(root).scheme == "file":
            for path in Path(unquote(urlsplit(root).path)).rglob("*"):
                if path.is_file():
                    yield str(path), path.read_bytes()
        else:
            storage = open_storage(root)
            for entry in storage.walk():
                yield entry.path, storage.read(entry.path)


def holding(settings: Settings, *texts: bytes) -> list[str]:
    """Names of files that hold one of the texts."""
    return [name for name, data in contents(settings) if any(text in data for text in texts)]


def values_of_parquet(settings: Settings) -> str:
    """Everything that the Parquet files say, compressed as they are on disk: of logs' checkpoints too."""
    import io

    import pyarrow.parquet as pq

    found = [pq.read_table(io.BytesIO(data)) for name, data in contents(settings) if name.endswith(".parquet")]
    return str([table.to_pylist() for table in found])


def bytes_of(settings: Settings, records: list[MemberRecord]) -> dict[MemberRecord, bytes]:
    storage = storage_of(settings)
    return {record: storage.read(record.bundle, record.offset, record.length) for record in records}


def test_erased_everywhere_and_nothing_else(spark: SparkSession, settings: Settings) -> None:
    gone, kept = landed(settings)
    run(spark, settings)
    before, rows = bytes_of(settings, kept), by_uid(settings)
    studies = {row["StudyInstanceUID"]: row for row in table_rows(settings, "studies")}
    delete(settings, sorted({one.SOPInstanceUID for one in gone}), reason="consent withdrawn")
    run(spark, settings)
    assert take(settings).compactable_bytes == sum(one.length for one in gone[:2] + gone[2:3] + gone[4:])
    assert holding(settings, PIXELS)
    planned = compact.run(settings, after=NOW, dry_run=True)
    assert (planned.instances, planned.members, planned.bytes) == (3, 5, sum(one.length for one in gone))
    assert holding(settings, PIXELS)
    seen: list[str] = []

    def on_step(name: str, *_: object) -> None:
        seen.append(name)
        assert bytes_of(settings, kept) == before

    report = compact.run(settings, after=NOW, vacuum=NOW, on_step=on_step)
    assert set(seen) == set(compact.STEPS)
    assert (report.bundles, report.rewritten, report.removed) == (3, 2, 1)
    assert (report.instances, report.members, report.bytes) == (3, 5, sum(one.length for one in gone))
    assert (dict(report.waiting), dict(report.failures)) == ({}, {})
    assert report.vacuumed
    assert holding(settings, PIXELS, NAME.encode(), b"MARKER-ID") == []
    assert "MARKER" not in values_of_parquet(settings)
    assert bytes_of(settings, kept) == before
    assert by_uid(settings) == {uid: row for uid, row in rows.items() if uid in {one.SOPInstanceUID for one in kept}}
    for row in table_rows(settings, "studies"):
        before_ = studies[row["StudyInstanceUID"]]
        assert {name: (row[name], before_[name]) for name in row if row[name] != before_[name]} == {}
    for row in table_rows(settings, "tombstones"):
        assert row["erased_at"] > row["deleted_at"]
        assert (row["reason"], row["deleted_by"]) == ("consent withdrawn", "test")
    assert (take(settings).deleted, take(settings).compactable_bytes) == (3, 0)
    sound(settings, kept)
    nothing_comes_back(spark, settings, gone)
    assert compact.run(settings, after=NOW).members == 0


def sound(settings: Settings, kept: list[MemberRecord]) -> None:
    """Journals follow from the tars, recovery changes nothing, and `tar` reads them."""
    storage = storage_of(settings)
    bundles = [state.bundle for state in Landed(storage).bundles()]
    assert set(bundles) == {one.bundle for one in kept}
    for bundle in bundles:
        assert verify(storage, bundle).problems == ()
        assert rebuild_journal(storage, bundle) == 0
        listed = subprocess.run(["tar", "tf", "-"], input=storage.read(bundle), capture_output=True, check=True)
        names = listed.stdout.decode().split()
        here = [f"{one.SOPInstanceUID}.dcm" for one in kept if one.bundle == bundle]
        assert [name for name in names if name != "erased"] == here
        assert listed.stderr == b""
    assert recover(storage, settings, now=lambda: 1e12).bundles == ()
    assert [one for bundle in bundles for one in Landed(storage).records(bundle)[0]] == kept


def nothing_comes_back(spark: SparkSession, settings: Settings, gone: list[MemberRecord]) -> None:
    """Undoing is refused, what comes again is buried, and a catalog made from nothing has none of it."""
    uids = sorted({one.SOPInstanceUID for one in gone})
    with closing(open_tombstones(settings)) as graves:
        with pytest.raises(BytesGone, match="the bytes of 3 of these instances are gone since compaction"):
            graves.restore(uids, by="test")
        assert graves.deleted(uids) == set(uids)
    assert not tombstones.waiting(settings)
    again = land(settings, [new_member(marked(slices(3, seed=1)[0]), second=60)])
    report = run(spark, settings)
    assert (report.deleted, report.rows) == (1, 0)
    assert {
        row["erased_at"] is None for row in table_rows(settings, "tombstones") if row["bundle"] == again[0].bundle
    } == {True}
    assert compact.run(settings, after=timedelta(days=3650)).members == 1  # the decision stands
    assert holding(settings, PIXELS) == []


def test_a_catalog_made_from_nothing(spark: SparkSession, local: Settings, tmp_path: Path) -> None:
    gone, _ = landed(local)
    run(spark, local)
    delete(local, sorted({one.SOPInstanceUID for one in gone}))
    run(spark, local)
    compact.run(local, after=NOW)
    before = by_uid(local)
    anew = local.model_copy(update={"catalog": local.catalog.model_copy(update={"root": (tmp_path / "anew").as_uri()})})
    anew = anew.model_copy(update={"extract": anew.extract.model_copy(update={"batch": 2})})
    report = run(spark, anew)
    assert (report.read, report.rows, report.rejected) == (4, 4, 0)
    assert {uid: row["offset"] for uid, row in by_uid(anew).items()} == {
        uid: row["offset"] for uid, row in before.items()
    }
    assert table_rows(anew, "quarantine") == []
    assert run(spark, anew).read == 0


def test_only_what_was_deleted_long_enough(spark: SparkSession, local: Settings) -> None:
    gone, _ = landed(local)
    run(spark, local)
    uids = sorted({one.SOPInstanceUID for one in gone})
    delete(local, uids[:1])
    assert compact.run(local, after=NOW).members == 0  # the tables do not follow yet, and `tombstones` has nothing
    run(spark, local)
    assert dict(compact.run(local).waiting) == {YOUNG: 1}
    assert take(local).deleted == 1
    restore(local, uids[:1])
    assert compact.run(local, after=NOW).members == 0
    run(spark, local)
    assert uids[0] in by_uid(local)
    assert holding(local, PIXELS)


def test_rows_that_are_still_in_the_tables_keep_their_bytes(spark: SparkSession, local: Settings) -> None:
    gone, _ = landed(local)
    run(spark, local)
    row = by_uid(local)[gone[0].SOPInstanceUID]
    delete(local, [gone[0].SOPInstanceUID])
    said = {name: row[name] for name in ("bundle", "offset", "length", "SOPInstanceUID", "StudyInstanceUID")}
    Tables(local).merge("tombstones", [said])  # as an extraction that was killed leaves it
    before = bytes_of(local, gone)
    assert dict(compact.run(local, after=NOW).waiting) == {SHOWN: 1}
    Tables(local).merge("tombstones", [{**said, "SOPInstanceUID": "1.2.3"}])  # as nothing we know of does
    with closing(open_tombstones(local)) as graves:
        graves.delete(
            [type("Named", (), {"StudyInstanceUID": "1", "SeriesInstanceUID": "1", "SOPInstanceUID": "1.2.3"})], by="x"
        )
    report = compact.run(local, after=NOW)
    assert dict(report.failures) == {
        row["bundle"]: f"bundle {row['bundle']}: a table has the member at byte {row['offset']}: left alone"
    }
    assert bytes_of(local, gone) == before


def test_a_journal_that_names_another_instance_costs_no_living_one(spark: SparkSession, local: Settings) -> None:
    """Headers decide which instance a member is."""
    gone, kept = landed(local)
    others = [changed(data, SeriesInstanceUID="1.2.3.9") for data in slices(2, seed=7, study=7)]
    named = [replace(new_member(data), SOPInstanceUID=gone[0].SOPInstanceUID) for data in others]
    kept += land(local, [new_member(slices(1, seed=8)[0]), *named])
    run(spark, local)
    before, shown = bytes_of(local, kept), by_uid(local)
    assert {one.SOPInstanceUID for one in map(new_member, others)} <= shown.keys()
    delete(local, [gone[0].SOPInstanceUID])
    run(spark, local)
    left = by_uid(local)
    report = compact.run(local, after=NOW)
    assert (report.instances, dict(report.failures)) == (1, {})
    assert by_uid(local) == left
    places = {(row["bundle"], row["offset"]) for row in left.values()}
    assert {one: data for one, data in bytes_of(local, kept).items() if (one.bundle, one.offset) in places} == {
        one: data for one, data in before.items() if (one.bundle, one.offset) in places
    }
    assert shown.keys() - left.keys() == {gone[0].SOPInstanceUID}


def test_what_landed_and_is_not_catalogued_waits(spark: SparkSession, local: Settings) -> None:
    gone, _ = landed(local)
    run(spark, local)
    delete(local, sorted({one.SOPInstanceUID for one in gone}))
    run(spark, local)
    late = land(local, [new_member(marked(slices(3, seed=1)[2]), second=60)])  # a receiver let it in
    report = compact.run(local, after=NOW)
    assert (report.instances, dict(report.waiting)) == (2, {UNCATALOGUED: 1})
    assert bytes_of(local, late)[late[0]].endswith(PIXELS)
    run(spark, local)
    report = compact.run(local, after=NOW)
    assert (report.instances, report.members, dict(report.waiting)) == (1, 2, {})
    assert holding(local, PIXELS) == []


def test_what_this_host_still_ships_waits(spark: SparkSession, local: Settings) -> None:
    gone, _ = landed(local)
    run(spark, local)
    delete(local, sorted({one.SOPInstanceUID for one in gone}))
    run(spark, local)
    spooled = local.ingest.spool_dir / gone[-1].bundle
    spooled.parent.mkdir(parents=True)
    spooled.write_bytes(storage_of(local).read(gone[-1].bundle))  # its shipper died before it removed it
    before = bytes_of(local, gone)
    report = compact.run(local, after=NOW)
    assert (report.instances, dict(report.waiting)) == (1, {UNCATALOGUED: 2})
    still = {
        one: data
        for one, data in before.items()
        if one.SOPInstanceUID in {gone[-1].SOPInstanceUID, gone[-2].SOPInstanceUID}
    }
    assert bytes_of(local, list(still)) == still
    spooled.unlink()
    assert compact.run(local, after=NOW).instances == 2
    assert holding(local, PIXELS) == []


def test_quarantined_members_and_a_bundle_without_any_other(spark: SparkSession, local: Settings) -> None:
    whole = marked(slices(1, seed=1)[0])
    cut = whole[: whole.index(b"MARKER^PATIENT") + 20]
    land(local, [new_member(cut)])
    _, kept = landed(local)
    run(spark, local)
    [rejected] = table_rows(local, "quarantine")
    delete(local, [rejected["SOPInstanceUID"]])
    run(spark, local)
    report = compact.run(local, after=NOW)
    assert report.instances == 1
    assert not storage_of(local).exists(rejected["bundle"])
    assert bytes_of(local, kept).keys() == set(kept)


def test_a_bundle_that_cannot_be_read_is_named_and_tried_again(spark: SparkSession, local: Settings) -> None:
    gone, kept = landed(local)
    run(spark, local)
    delete(local, sorted({one.SOPInstanceUID for one in gone}))
    run(spark, local)
    storage = storage_of(local)
    bundle = kept[0].bundle
    whole = storage.read(bundle)
    at = kept[0].offset + kept[0].dataset_offset + 40
    storage.write(bundle, whole[:at] + b"\0\0\0\0\0\0" + whole[at + 6 :])
    report = compact.run(local, after=NOW)
    assert report.instances == 2
    assert list(report.failures) == [bundle]
    assert "other bytes than its sha256 says" in report.failures[bundle]
    storage.write(bundle, whole)
    report = compact.run(local, after=timedelta(days=3650))
    assert (report.instances, report.members, dict(report.failures)) == (1, 1, {})
    assert holding(local, PIXELS) == []


def test_as_of_and_indexes_of_before(spark: SparkSession, local: Settings) -> None:
    gone, kept = landed(local)
    run(spark, local)
    query = Query.build("IMAGE", {"StudyInstanceUID": kept[0].StudyInstanceUID})
    with QueryService(local) as service:
        first = 0
        assert len(list(service.find(query))) == 4
        delete(local, sorted({one.SOPInstanceUID for one in gone}))
        run(spark, local)
        compact.run(local, after=NOW)
        storage = storage_of(local)
        for as_of in (None, first):
            found = list(service.lookup_instances(study=[kept[0].StudyInstanceUID], as_of=as_of))
            assert {(one.bundle, one.offset) for one in found} == {(one.bundle, one.offset) for one in kept}
            assert all(storage.read(one.bundle, one.offset, one.length)[128:132] == b"DICM" for one in found)
            assert list(service.lookup_instances(study=[gone[0].StudyInstanceUID], as_of=as_of)) == []
        compact.run(local, after=NOW, vacuum=NOW)
        assert len(list(service.find(query))) == 4
    shutil.rmtree(local.archive.state_dir / "index")  # of versions of before, too
    with QueryService(local) as service:
        assert len(list(service.find(query))) == 4
        with pytest.raises(CatalogError, match=r"the catalog has no version as of 0: versions \d+ to \d+ are known"):
            list(service.find(query, as_of=first))
    before = all_tables(local)
    assert run(spark, local).read == 0
    assert all_tables(local) == before


def test_vacuum_keeps_what_is_young_or_still_to_be_forwarded(spark: SparkSession, local: Settings) -> None:
    gone, _ = landed(local)
    run(spark, local)
    delete(local, [gone[0].SOPInstanceUID])
    run(spark, local)
    before = sorted(name for name, _ in contents(local))
    report = compact.run(local, after=timedelta(days=1), vacuum=timedelta(days=1))
    assert report.vacuumed == 0
    assert sorted(name for name, _ in contents(local)) == before
    tables = Tables(local)
    tables.append("forwards", [], onto=tables.ensure("forwards"), mark=("sphere.forwards", 1))
    report = compact.run(local, after=timedelta(days=1), vacuum=NOW, dry_run=True)
    kept = [path for path, _ in contents(local) if "/instances/" in path and path.endswith(".parquet")]
    compact.run(local, after=timedelta(days=1), vacuum=NOW)
    assert [path for path, _ in contents(local) if "/instances/part" in path and path.endswith(".parquet")] == [
        path for path in kept if "/instances/part" in path
    ]


def test_a_log_that_is_cut_again_and_again_stays_readable(spark: SparkSession, local: Settings) -> None:
    """The checkpoint that readers are pointed at is always there, for delta-rs and for Spark."""
    landed(local)
    run(spark, local)
    tables = Tables(local)
    table = f"{local.catalog_root}/studies"
    log = Path(unquote(urlsplit(table).path)) / "_delta_log"
    DeltaTable(table).create_checkpoint()
    rows = table_rows(local, "studies")
    last = DeltaTable(table).version()
    for number in range(3):
        for _ in range(2):
            tables.append("studies", [], onto=tables.ensure("studies"))
        moment = datetime.now(timezone.utc)
        tables.append("studies", [], onto=tables.ensure("studies"))
        if number == 1:
            DeltaTable(table).create_checkpoint()
        age = datetime.now(timezone.utc) - moment
        report = compact.run(local, vacuum=age)
        assert dict(report.failures) == {}
        pointed = orjson.loads((log / "_last_checkpoint").read_bytes())["version"]
        assert (log / f"{pointed:020}.checkpoint.parquet").exists()
        versions = sorted(int(path.name[:20]) for path in log.glob("*.json"))
        assert versions[-1] == DeltaTable(table).version() == last + 3
        assert versions[0] >= last
        last = versions[-1]
        assert table_rows(local, "studies") == rows
        assert spark.read.format("delta").load(unquote(table)).count() == len(rows)
    compact.run(local, vacuum=NOW)
    assert [int(path.name[:20]) for path in log.glob("*.json")] == [last]
    assert table_rows(local, "studies") == rows
    run(spark, local)


def test_snapshots_of_the_settings_are_not_vacuumed(spark: SparkSession, local: Settings) -> None:
    landed(local)
    run(spark, local)
    for as_of in (0, datetime(2026, 1, 1)):
        snapshot = Snapshot(ae_title="PAST", as_of=as_of)
        settings = local.model_copy(update={"snapshots": (snapshot,)})
        before = sorted(name for name, _ in contents(local))
        with pytest.raises(SettingsError, match=r"snapshots: PAST answers as of .*, which a vacuum would remove"):
            compact.run(settings, after=NOW, vacuum=NOW)
        assert sorted(name for name, _ in contents(local)) == before


def test_one_at_a_time(spark: SparkSession, local: Settings) -> None:
    with CatalogLock(local, job="compact"), pytest.raises(LockHeld, match="the catalog is being written by compact"):
        compact.run(local)


def test_an_archive_in_which_nothing_was_deleted(spark: SparkSession, local: Settings) -> None:
    assert compact.run(local).members == 0
    landed(local)
    run(spark, local)
    before = all_tables(local)
    began = datetime.now(timezone.utc)
    report = compact.run(local, after=NOW, vacuum=NOW)
    assert (report.bundles, report.members, dict(report.failures)) == (0, 0, {})
    assert all_tables(local) == before
    assert datetime.now(timezone.utc) > began


def test_options_are_the_settings_by_default(local: Settings) -> None:
    asked: dict[str, Any] = {"after_days": 7.0}
    assert local.compact.model_dump() == asked
