"""Tables as jobs write them, and the roll-ups, without Spark."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from sphere.catalog.schema import TABLES
from sphere.conf.errors import CatalogError, JobFailed
from sphere.conf.settings import Settings
from sphere.jobs import lookup, opened, rollup
from sphere.jobs import tables as module
from sphere.jobs.parquet import NewFile
from sphere.jobs.rolling import COLUMNS, Rolled
from sphere.jobs.rolling import roll_up as roll_up_rows
from sphere.jobs.tables import Tables, changed
from tests.support.catalog import instance, roll_up, write_table
from tests.support.landing import archive, table_rows

pytestmark = pytest.mark.unit

ROWS = [{"bundle": f"bundles/{name}.tar", "journal_bytes": 10, "members": 1, "sealed": False} for name in "abc"]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return archive(tmp_path / "an archive")


def test_merge_is_by_key(settings: Settings) -> None:
    tables = Tables(settings)
    tables.merge("bundles", ROWS)
    tables.merge("bundles", [{**ROWS[1], "sealed": True}], gone=[ROWS[2], {**ROWS[2], "bundle": "bundles/never.tar"}])
    assert table_rows(settings, "bundles") == [ROWS[0], {**ROWS[1], "sealed": True}]
    tables.merge("bundles", [])
    assert DeltaTable(tables.url("bundles")).version() == 1  # the first merge made the table


def test_a_table_that_another_process_made_meanwhile_is_left_as_it_is(settings: Settings) -> None:
    tables = Tables(settings)
    tables.merge("bundles", ROWS[:1])
    file = NewFile("part-x.parquet", 1, 1, '{"numRecords": 1}')
    with pytest.raises(JobFailed, match="bundles was changed by another process"):
        tables.append("bundles", [file], onto=None)
    assert table_rows(settings, "bundles") == ROWS[:1]


def test_commit_onto_another_version_is_refused(settings: Settings) -> None:
    tables = Tables(settings)
    seen = tables.ensure("bundles")
    tables.merge("bundles", ROWS[:1])
    with pytest.raises(JobFailed, match="bundles was changed by another process"):
        tables.merge("bundles", ROWS[1:], onto=seen)
    file = NewFile("part-x.parquet", 1, 1, '{"numRecords": 1}')
    with pytest.raises(JobFailed, match="bundles was changed by another process"):
        tables.append("bundles", [file], onto=seen)
    assert table_rows(settings, "bundles") == ROWS[:1]


def test_an_open_table_is_gone_on_with(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its log is read once and its files are listed once, however many commits of ours follow."""
    listed: list[int] = []

    def counted(table: DeltaTable) -> dict[str, int]:
        listed.append(table.version())
        return lookup.files(table)

    monkeypatch.setattr(opened, "files", counted)
    tables = Tables(settings)
    first = tables.ensure("patients")
    for number in range(3):
        tables.merge("patients", [{"patient_key": f"1:{number}", "PatientID": str(number)}])
        tables.merge("patients", [{"patient_key": "1:0", "PatientID": f"now {number}"}])
    assert tables.ensure("patients") is first
    assert first.version() == 6
    assert listed == [0]
    assert [row["PatientID"] for row in table_rows(settings, "patients")] == ["now 2", "1", "2"]


def test_a_table_held_while_another_process_commits_keeps_its_version(settings: Settings) -> None:
    tables, other = Tables(settings), Tables(settings)
    tables.merge("bundles", ROWS[:1])
    held = tables.ensure("bundles")
    other.merge("bundles", ROWS[1:2])
    assert tables.ensure("bundles").version() == held.version() + 1
    with pytest.raises(JobFailed, match="bundles was changed by another process"):
        tables.merge("bundles", ROWS[2:], onto=held)
    tables.merge("bundles", ROWS[2:])
    assert table_rows(settings, "bundles") == ROWS


def test_a_table_that_was_made_anew_is_opened_anew(settings: Settings) -> None:
    tables = Tables(settings)
    tables.merge("bundles", ROWS[:1])
    tables.merge("bundles", ROWS[1:2])
    shutil.rmtree(Path(unquote(tables.url("bundles").removeprefix("file://"))))
    assert tables.open("bundles") is None
    tables.merge("bundles", ROWS[2:])
    assert table_rows(settings, "bundles") == ROWS[2:]


def test_missing_columns_are_added(settings: Settings) -> None:
    tables = Tables(settings)
    schema = TABLES["bundles"].schema
    DeltaTable.create(tables.url("bundles"), pa.schema([field for field in schema if field.name != "sealed"]))
    tables.merge("bundles", ROWS)
    assert table_rows(settings, "bundles") == ROWS


def test_another_type_is_an_error(settings: Settings) -> None:
    tables = Tables(settings)
    DeltaTable.create(tables.url("bundles"), pa.schema([("bundle", pa.int64())]))
    with pytest.raises(CatalogError, match="bundles: column bundle is int64, this version needs string"):
        tables.ensure("bundles")


def study(number: int, *, study_uid: str, series: str, patient: str | None, **attributes: Any) -> dict[str, Any]:
    uids = {"StudyInstanceUID": study_uid, "SeriesInstanceUID": series, "PatientID": patient}
    return instance(number, **{**uids, "IssuerOfPatientID": None, "Modality": "CT", **attributes})


BEFORE = [
    study(1, study_uid="1.1", series="1.1.1", patient="A", StudyDescription=None),
    study(2, study_uid="1.1", series="1.1.1", patient="A", StudyDescription="later one"),
    study(3, study_uid="1.1", series="1.1.2", patient="A"),
    study(4, study_uid="1.2", series="1.2.1", patient="A"),
    study(5, study_uid="1.3", series="1.3.1", patient=None),
]
MOVED = [
    study(3, study_uid="1.4", series="1.4.1", patient="B"),  # leaves its series empty
    study(4, study_uid="1.2", series="1.2.1", patient="C"),  # leaves patient A
    study(6, study_uid="1.3", series="1.3.1", patient=None),
]


AFTER = [BEFORE[1], BEFORE[4], *MOVED]


def write(settings: Settings, rows: list[dict[str, Any]]) -> None:
    """Make `instances` hold these rows."""
    write_table(settings, TABLES["instances"], rows)


def refresh(settings: Settings) -> list[str]:
    names: list[str] = []
    rollup.refresh(Tables(settings), settings, on_step=names.append)
    return names


def check(settings: Settings) -> None:
    """The roll-ups against a plain computation over the tables they come from."""
    for name in ("series", "studies", "patients"):
        spec = TABLES[name].roll_up
        assert spec is not None
        found = table_rows(settings, name)
        expected = roll_up(spec, table_rows(settings, spec.source))
        if name == "studies":
            assert {row.pop("patient_key") for row in found}
        assert sorted(map(_canonical, found)) == sorted(map(_canonical, expected)), name


def _canonical(row: dict[str, Any]) -> str:
    return str(sorted(row.items()))


def test_roll_ups_follow_what_changed(settings: Settings) -> None:
    assert refresh(settings) == []
    write(settings, BEFORE)
    assert refresh(settings) == ["contradictions", "patients", "studies", "series"]
    check(settings)
    assert refresh(settings) == []
    write(settings, AFTER)
    refresh(settings)
    check(settings)
    assert {row["PatientID"] for row in table_rows(settings, "patients")} == {"A", "B", "C", None}
    assert "1.1.2" not in {row["SeriesInstanceUID"] for row in table_rows(settings, "series")}


@pytest.mark.parametrize("after", ["patients", "studies"])
def test_roll_ups_cut_short_are_completed(settings: Settings, after: str) -> None:
    write(settings, BEFORE)
    refresh(settings)
    write(settings, AFTER)

    class Cut(Exception):
        pass

    def stop(name: str) -> None:
        if name == {"patients": "studies", "studies": "series"}[after]:
            raise Cut(name)

    with pytest.raises(Cut, match="s"):
        rollup.refresh(Tables(settings), settings, on_step=stop)
    refresh(settings)
    check(settings)


def add(settings: Settings, *tasks: list[dict[str, Any]], split: tuple[str, ...] = ()) -> rollup.Added:
    """Append the rows in one commit, and roll them up as tasks that have these rows do."""
    onto = Tables(settings).ensure("instances").version()
    write_table(settings, TABLES["instances"], [row for rows in tasks for row in rows], "append")
    pieces = [pa.Table.from_pylist(rows, schema=TABLES["instances"].schema) for rows in tasks]
    rolled = (roll_up_rows(piece.select(COLUMNS), split=split) for piece in pieces)
    return rollup.Added(onto, [Rolled.unpack(**one.pack()) for one in rolled])


NEW = [
    study(10, study_uid="2.1", series="2.1.1", patient="A", StudyDescription=None, Manufacturer="first"),
    study(11, study_uid="2.1", series="2.1.1", patient="A", StudyDescription="later one", collections=["x"]),
    study(12, study_uid="2.2", series="2.2.1", patient="Z"),
    study(13, study_uid="2.2", series="2.2.2", patient="Z", Modality="PT"),
]


@pytest.mark.parametrize(
    ("tasks", "split", "again"),
    [
        ([NEW], (), 0),
        ([NEW[:2], NEW[2:]], (), 0),
        ([NEW[:3], NEW[3:]], ("2.2",), 0),
        ([NEW[:3], NEW[3:]], (), 1),  # a study that no task knew to be split
        ([NEW, [study(14, study_uid="1.1", series="1.1.9", patient="A")]], (), 1),  # one that was there before
    ],
)
def test_new_studies_are_rolled_up_without_reading_them(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tasks: list[Any], split: tuple[str, ...], again: int
) -> None:
    write(settings, BEFORE)
    refresh(settings)
    added = add(settings, *tasks, split=split)
    asked: list[Any] = []
    real = Tables.pieces
    monkeypatch.setattr(Tables, "pieces", lambda *args, **how: (asked.append((args[1], how)), real(*args, **how))[1])
    rollup.refresh(Tables(settings), settings, on_step=lambda name: None, added=added)
    assert [len(how["values"]) for name, how in asked if name == "instances"] == [1] * again
    check(settings)
    assert refresh(settings) == []


def test_roll_ups_of_tasks_are_for_the_next_version_only(settings: Settings) -> None:
    """Where a run before was cut short, or somebody else wrote, what changed comes from the change feed."""
    add(settings, BEFORE)  # and the run that added them ends
    added = add(settings, NEW)
    rollup.refresh(Tables(settings), settings, on_step=lambda name: None, added=added)
    check(settings)
    added = add(settings, [study(20, study_uid="3.1", series="3.1.1", patient="A")])
    write(settings, AFTER)
    rollup.refresh(Tables(settings), settings, on_step=lambda name: None, added=added)
    check(settings)


def test_merge_writes_only_files_that_hold_a_key(settings: Settings) -> None:
    tables = Tables(settings)
    for number in range(4):
        tables.merge("patients", [{"patient_key": f"1:{number}", "PatientID": str(number)}])
    before = set(DeltaTable(tables.url("patients")).file_uris())
    tables.merge("patients", [{"patient_key": "1:2", "PatientID": "two"}, {"patient_key": "1:9"}])
    after = set(DeltaTable(tables.url("patients")).file_uris())
    assert (len(before - after), len(after - before)) == (1, 1)
    assert [row["PatientID"] for row in table_rows(settings, "patients")] == ["0", "1", "two", "3", None]


def test_merge_leaves_a_file_whose_rows_come_as_they_are(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALL", 0)
    tables = Tables(settings)
    rows = [{"patient_key": f"1:{number}", "collections": [f"{number}"]} for number in range(4)]
    for at in (0, 2):
        tables.merge("patients", rows[at : at + 2])
    before = set(DeltaTable(tables.url("patients")).file_uris())
    version = tables.ensure("patients").version()
    tables.merge("patients", [*rows[:3], {**rows[3], "collections": None}], mark=("test", 7))
    after = DeltaTable(tables.url("patients"))
    assert (len(before - set(after.file_uris())), len(set(after.file_uris()) - before)) == (1, 1)
    assert (after.version(), after.transaction_version("test")) == (version + 1, 7)
    tables.merge("patients", rows[:2], mark=("test", 8))
    assert DeltaTable(tables.url("patients")).transaction_version("test") == 8
    assert set(DeltaTable(tables.url("patients")).file_uris()) == set(after.file_uris())
    tables.merge("patients", (), gone=[{"patient_key": "1:0"}])
    assert [row["collections"] for row in table_rows(settings, "patients")] == [["1"], ["2"], None]


def test_merge_joins_small_files(settings: Settings) -> None:
    tables = Tables(settings)
    for number in range(20):
        tables.merge("bundles", [{**ROWS[0], "bundle": f"bundles/{number:02}.tar"}])
    assert len(DeltaTable(tables.url("bundles")).file_uris()) <= 8
    assert len(table_rows(settings, "bundles")) == 20


def test_roll_ups_without_a_change_feed_are_computed_anew(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    write(settings, BEFORE)
    refresh(settings)
    write(settings, AFTER)

    def cleaned(*args: Any, **kwargs: Any) -> Any:
        raise DeltaError("the log no longer reaches so far back")

    monkeypatch.setattr(rollup, "changed", cleaned)
    refresh(settings)
    check(settings)


def test_changed_names_old_and_new_keys(settings: Settings) -> None:
    tables = Tables(settings)
    write(settings, BEFORE)
    table = tables.ensure("instances")
    since = table.version()
    write(settings, [*BEFORE[:2], *BEFORE[3:], MOVED[0]])
    found = changed(tables.ensure("instances"), ("StudyInstanceUID",), since=since)
    assert sorted(found["StudyInstanceUID"].to_pylist()) == ["1.1", "1.2", "1.3", "1.4"]  # the file was written anew
