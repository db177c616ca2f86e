"""Tables that stay open: what is read of their logs, and what is not, from one job to the next."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import orjson
import pytest
from deltalake import DeltaTable

from sphere.conf.errors import JobFailed
from sphere.conf.settings import Settings
from sphere.ingest.storage.local import LocalStorage
from sphere.jobs import lookup, opened
from sphere.jobs.catalogued import SEALED, Catalogued
from sphere.jobs.commits import CHECKPOINTS
from sphere.jobs.opened import Seen
from sphere.jobs.tables import Tables
from tests.support.delta_logs import tell_of_logs
from tests.support.landing import archive, copy_of, table_rows

pytestmark = pytest.mark.unit

Row = dict[str, Any]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return archive(tmp_path / "an archive")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often delta-rs read a log, or what came to it, and a table's files were listed."""
    counts: Counter[str] = Counter()

    def files(table: DeltaTable) -> dict[str, int]:
        counts["listed"] += 1
        return lookup.files(table)

    tell_of_logs(monkeypatch, lambda what, _: counts.update([what]))
    monkeypatch.setattr(opened, "files", files)
    return counts


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the Parquet files that are read."""
    paths: list[str] = []
    real = LocalStorage.read

    def reads(self: LocalStorage, path: str, *args: Any) -> bytes:
        if path.endswith(".parquet"):
            paths.append(path)
        return real(self, path, *args)

    monkeypatch.setattr(LocalStorage, "read", reads)
    return paths


def bundle(number: int, *, sealed: bool = True) -> Row:
    return {"bundle": f"bundles/{number:03}.tar", "journal_bytes": 10, "members": 1, "sealed": sealed}


def patient(number: int, studies: int = 1) -> Row:
    return {"patient_key": f"1:{number:03}", "NumberOfPatientRelatedStudies": studies}


def studies_of(tables: Tables, *numbers: int) -> list[int]:
    values = [f"1:{number:03}" for number in numbers]
    columns = ("NumberOfPatientRelatedStudies",)
    found = tables.find("patients", columns, key="patient_key", values=values, at=tables.latest("patients"))
    counts: list[int] = sorted(found[columns[0]].to_pylist())
    return counts


def test_commits_of_ours_are_not_read_again(settings: Settings, asked: Counter[str]) -> None:
    """However many there are: their log is read once, and the table's files are listed once."""
    Tables(settings).merge("patients", [patient(0)])
    asked.clear()
    tables = Tables(settings)
    for number in range(1, 30):
        tables.look_again()
        tables.merge("patients", [patient(number), patient(0, number)])
        seen = tables.latest("patients")
        assert isinstance(seen, Seen)
        assert studies_of(tables, 0, number) == sorted((1, number))
    assert asked == {"opened": 1, "listed": 1}
    table = tables.open("patients")
    assert table is not None
    assert (table.version(), lookup.files(table)) == (seen.version(), seen.sizes)
    assert asked["brought up to date"] == 1
    assert tables.latest("patients") is table


def test_what_was_seen_keeps_its_version(settings: Settings) -> None:
    """And a commit onto it is refused once anybody has committed since."""
    tables = Tables(settings)
    for number in range(3):
        tables.merge("patients", [patient(number)])
    seen = tables.latest("patients")
    assert isinstance(seen, Seen)
    Tables(settings).merge("patients", [patient(0, 9)])
    with pytest.raises(JobFailed, match="patients was changed by another process"):
        tables.merge("patients", [patient(1, 9)], onto=seen)
    assert studies_of(tables, 0, 1) == [1, 9]
    tables.merge("patients", [patient(1, 8)])
    assert studies_of(tables, 0, 1) == [8, 9]


def test_a_checkpoint_is_due(settings: Settings, asked: Counter[str]) -> None:
    """The commit before it is one of delta-rs, on a table that nobody looked at for a hundred commits."""
    Tables(settings).merge("bundles", [bundle(0)])
    tables = Tables(settings)
    tables.paths("bundles")
    for _ in range(CHECKPOINTS + 1):
        tables.append("bundles", [], onto=tables.latest("bundles"))
    log = Path(tables.url("bundles").removeprefix("file://").replace("%20", " ")) / "_delta_log"
    assert orjson.loads((log / "_last_checkpoint").read_bytes())["version"] == CHECKPOINTS - 1
    assert DeltaTable(tables.url("bundles")).version() == CHECKPOINTS + 1
    assert asked["brought up to date"] + asked["opened"] <= 4
    assert [row["bundle"] for row in table_rows(settings, "bundles")] == ["bundles/000.tar"]


def test_a_commit_that_is_due_for_a_checkpoint_is_refused_too(settings: Settings) -> None:
    tables = Tables(settings)
    tables.merge("bundles", [bundle(0)])
    tables.paths("bundles")
    while (seen := tables.latest("bundles")) is not None and (seen.version() + 2) % CHECKPOINTS:
        tables.append("bundles", [], onto=seen)
    assert isinstance(seen, Seen)
    Tables(settings).merge("bundles", [bundle(1)])
    with pytest.raises(JobFailed, match="bundles was changed by another process"):
        tables.append("bundles", [], onto=seen)


@pytest.mark.parametrize("whose", ["made anew", "a copy"])
def test_another_table_of_as_many_commits_is_found_out(settings: Settings, tmp_path: Path, whose: str) -> None:
    """Between two jobs somebody put it in the place of the one that was open."""
    tables = Tables(settings)
    folder = Path(settings.catalog_root.removeprefix("file://").replace("%20", " "))
    tables.merge("patients", [patient(0)])
    other = copy_of(settings, tmp_path / "another") if whose == "a copy" else archive(tmp_path / "another")
    if whose == "made anew":
        Tables(other).merge("patients", [patient(5)])
    tables.merge("patients", [patient(1)])
    assert studies_of(tables, 0, 1) == [1, 1]
    Tables(other).merge("patients", [patient(2, 7)])
    shutil.rmtree(folder)
    shutil.copytree(Path(other.catalog_root.removeprefix("file://")), folder)
    tables.look_again()
    assert studies_of(tables, 1, 2) == [7]
    tables.merge("patients", [patient(2, 8)])
    assert studies_of(tables, 0, 1, 2) == [1, 8][whose == "made anew" :]


def test_what_another_process_knows_of_keys_is_read(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """It joins what we have open, and learns of files; where all that is gone, it is made anew."""
    ours = Tables(settings)
    for number in range(3):
        ours.merge("patients", [patient(number)])
        assert studies_of(ours, number) == [1]
    for number in range(3, 12):
        others = Tables(settings)
        others.merge("patients", [patient(number)])
        assert studies_of(others, number) == [1]
    ours.look_again()
    with monkeypatch.context() as patch:
        patch.setattr(Tables, "read", lambda *_: pytest.fail("keys of a file are read that are known"))
        assert studies_of(ours, *range(12)) == [1] * 12
    shutil.rmtree(settings.archive.state_dir / "keys")
    ours.look_again()
    assert studies_of(ours, *range(12)) == [1] * 12
    assert studies_of(Tables(settings), 0, 11) == [1, 1]


def test_rows_of_bundles_are_read_once(settings: Settings, read: list[str]) -> None:
    """As the table has them, while files of it come, are joined, and lose rows."""
    writing, reading = Tables(settings), Tables(settings)
    catalogued = Catalogued(reading)
    assert catalogued.rows() == {}
    seen: set[str] = set()
    for number in range(24):
        gone = [bundle(number - 7)] if number % 5 == 4 and number > 7 else []
        writing.merge("bundles", [bundle(number, sealed=False), *([bundle(number - 1)] if number else [])], gone=gone)
        reading.look_again()
        read.clear()
        rows = {row["bundle"]: row for row in table_rows(settings, "bundles")}
        found = catalogued.rows()
        assert found == {name: SEALED if row["sealed"] else row for name, row in rows.items()}
        assert not seen & set(read)
        seen |= set(read)
        read.clear()
        assert catalogued.rows() == found
        assert not read


def test_bundles_that_come_open_no_file_of_others(settings: Settings, read: list[str]) -> None:
    tables = Tables(settings)
    for start in (0, 100, 200):
        tables.merge("bundles", [bundle(number) for number in range(start, start + 100)])
    tables.merge("bundles", [bundle(300)])
    read.clear()
    before = set(tables.paths("bundles"))
    tables.merge("bundles", [bundle(301, sealed=False)])
    assert len(set(read)) <= 1  # what the merge before wrote, for its keys
    assert before < set(tables.paths("bundles"))
    tables.merge("bundles", [bundle(150), bundle(301)])
    assert len(before - set(tables.paths("bundles"))) == 1


def test_what_a_merge_wrote_is_found_without_reading(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, read: list[str]
) -> None:
    """Patients who come again and again: a file is read when it is new to this process, and what another one wrote is
    never missed."""
    monkeypatch.setattr("sphere.jobs.tables.SMALL", 0)
    monkeypatch.setattr("sphere.jobs.tables.file_rows", lambda name: 10)
    Tables(settings).merge("patients", [patient(number) for number in range(50)])
    tables = Tables(settings)
    keys = [f"1:{number:03}" for number in (3, 14, 15, 49)]

    def again(tables: Tables) -> list[int]:
        tables.look_again()
        tables.foresee("patients", keys)
        rows = tables.find_to_merge("patients", keys, at=tables.latest("patients")).to_pylist()
        more = [{**row, "NumberOfPatientRelatedStudies": row["NumberOfPatientRelatedStudies"] + 1} for row in rows]
        tables.merge("patients", more)
        return [row["NumberOfPatientRelatedStudies"] for row in rows]

    assert again(tables) == [1] * 4
    read.clear()
    for count in (2, 3, 4):
        assert again(tables) == [count] * 4
        assert not read
    assert again(Tables(settings)) == [5] * 4
    assert again(tables) == [6] * 4
    assert table_rows(settings, "patients") == [
        {**row, "NumberOfPatientRelatedStudies": 7 if row["patient_key"] in keys else 1}
        for row in table_rows(settings, "patients")
    ]
