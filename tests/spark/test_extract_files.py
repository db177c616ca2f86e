"""Merges take out of a table the files that hold one of the keys that change, and no other, whatever the table has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from pyspark.sql import SparkSession

from sphere.conf.settings import Settings
from sphere.ingest.header import identify
from sphere.jobs import headers, joining
from sphere.jobs import tables as module
from sphere.jobs.catalogued import Catalogued
from sphere.jobs.extract import Kept, run
from sphere.jobs.tables import Tables
from tests.support.delta_logs import tell_of_logs
from tests.support.landing import archive, changed, land, new_member, slices, table_rows
from tests.support.tombs import delete

pytestmark = pytest.mark.spark

KEYS = {
    "instances": "StudyInstanceUID",
    "series": "StudyInstanceUID",
    "studies": "StudyInstanceUID",
    "patients": "patient_key",
}
OF_A_STUDY = 4
IN_A_FILE = 2
"""Studies, and as many series and patients."""


@dataclass(frozen=True)
class Archive:
    """An archive of studies with one patient, one series and OF_A_STUDY instances each."""

    settings: Settings
    studies: dict[str, list[bytes]]
    spark: SparkSession
    kept: Kept

    @classmethod
    def of(cls, count: int, folder: Path, spark: SparkSession) -> Archive:
        studies = [slices(OF_A_STUDY, seed=number, study=number) for number in range(count)]
        settings = archive(folder, ingest={"on_conflict": "replace"})
        made = cls(settings, {_study(one[0]): one for one in studies}, spark, Kept(settings))
        made.extract(data for one in studies for data in one)
        return made

    def extract(self, files: Iterable[bytes], *, second: int = 0) -> None:
        land(self.settings, [new_member(data, second=second) for data in files])
        run(self.spark, self.settings, kept=self.kept)

    def holding(self) -> dict[str, dict[str, set[str]]]:
        """By table and file, the studies of which it has something."""
        of_patient: dict[str, set[str]] = {}
        for row in table_rows(self.settings, "studies"):
            of_patient.setdefault(row["patient_key"], set()).add(row["StudyInstanceUID"])
        found: dict[str, dict[str, set[str]]] = {}
        for name, key in KEYS.items():
            for path in DeltaTable(f"{self.settings.catalog_root}/{name}").file_uris():
                values = set(pq.ParquetFile(path.removeprefix("file://")).read(columns=[key])[key].to_pylist())
                studies = set().union(*(of_patient[one] for one in values)) if name == "patients" else values
                found.setdefault(name, {})[path] = studies
        return found

    def apart(self, count: int) -> list[str]:
        """Studies of which no two have something in one file of a table."""
        files = [studies for by_path in self.holding().values() for studies in by_path.values()]
        chosen: list[str] = []
        for study in self.studies:
            if not any(study in studies and studies & set(chosen) for studies in files):
                chosen.append(study)
        assert len(chosen) >= count
        return chosen[:count]

    def check(self, change: Callable[[], None], out: dict[str, int], studies: Collection[str]) -> dict[str, int]:
        """That a change takes so many files out of each table, all of which have something of these studies; returns
        how many come in."""
        before = self.holding()
        change()
        after = self.holding()
        gone = {name: before[name].keys() - after[name].keys() for name in KEYS}
        assert {name: len(paths) for name, paths in gone.items()} == out
        assert all(before[name][path] & set(studies) for name, paths in gone.items() for path in paths)
        return {name: len(after[name].keys() - before[name].keys()) for name in KEYS}


def _study(data: bytes) -> str:
    return identify(data, size=len(data)).StudyInstanceUID


def _instance(data: bytes) -> str:
    return identify(data, size=len(data)).SOPInstanceUID


def test_merges_touch_the_files_that_they_must(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New studies, series more, another version of an instance, deletions: the same files at both sizes."""
    monkeypatch.setattr(headers, "TASK_MEMBERS", IN_A_FILE * OF_A_STUDY)
    monkeypatch.setattr(module, "file_rows", lambda name: IN_A_FILE)
    monkeypatch.setattr(module, "SMALL", 0)  # no file is joined with others
    monkeypatch.setattr(joining, "SIZES", ())
    small, large = (_touched(Archive.of(count, tmp_path / f"{count}", spark)) for count in (16, 48))
    assert small == large


def _touched(made: Archive) -> list[dict[str, int]]:
    """Files that came into the tables, by change; those that left are checked here."""
    files = {name: len(paths) for name, paths in made.holding().items()}
    assert files == dict.fromkeys(KEYS, len(made.studies) // IN_A_FILE)
    grown, replaced, cut, emptied = [made.apart(8)[at : at + 2] for at in (0, 2, 4, 6)]
    numbers = {study: number for number, study in enumerate(made.studies)}
    none, two = dict.fromkeys(KEYS, 0), dict.fromkeys(KEYS, 2)
    fresh = [data for number in (900, 901) for data in slices(OF_A_STUDY, seed=number, study=number)]
    more = [data for study in grown for data in slices(OF_A_STUDY, seed=500 + numbers[study], study=numbers[study])]
    again = [changed(made.studies[study][1], SeriesDescription="sent again") for study in replaced]
    once = [_instance(made.studies[study][0]) for study in cut]
    wholly = [_instance(data) for study in emptied for data in made.studies[study]]

    def without(uids: list[str]) -> None:
        delete(made.settings, uids)
        run(made.spark, made.settings, kept=made.kept)

    files_in = [
        made.check(lambda: made.extract(fresh, second=10), none, ()),
        made.check(lambda: made.extract(fresh, second=20), none, ()),
        made.check(lambda: made.extract(more, second=30), {**two, "instances": 0, "series": 0}, grown),
        made.check(lambda: made.extract(again, second=40), two, replaced),
        made.check(lambda: without(once), two, cut),
        made.check(lambda: without(wholly), two, emptied),
    ]
    check_patients(made)
    return files_in


def check_patients(made: Archive) -> None:
    """Spark reads of files with other codecs what delta-rs does, which is what the studies say."""
    columns = ("patient_key", "PatientName", "NumberOfPatientRelatedSeries", "size_bytes")
    rows = made.spark.read.format("delta").load(f"{made.settings.catalog_root}/patients").select(*columns).collect()
    theirs = sorted(table_rows(made.settings, "patients"), key=lambda row: str(row["patient_key"]))
    assert sorted(map(tuple, rows)) == [tuple(row[name] for name in columns) for row in theirs]
    studies = table_rows(made.settings, "studies")
    series: Counter[str] = Counter()
    for row in studies:
        series[row["patient_key"]] += row["NumberOfStudyRelatedSeries"]
    assert series == {row["patient_key"]: row["NumberOfPatientRelatedSeries"] for row in theirs}


def test_a_run_goes_on_with_what_the_one_before_has_opened(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logs of all tables are read once, that of `instances` not even for what was committed to it."""
    made = Archive.of(4, tmp_path / "archive", spark)
    made.extract(slices(OF_A_STUDY, seed=800, study=800), second=10)
    asked: Counter[str] = Counter()

    tell_of_logs(monkeypatch, lambda what, name: asked.update([what, f"{name} {what}"]))
    made.kept.tables = Tables(made.settings)
    made.kept.catalogued = Catalogued(made.kept.tables)
    for number in range(801, 804):
        made.extract(slices(OF_A_STUDY, seed=number, study=number), second=number)
        if number == 801:
            asked.clear()
    assert (asked["opened"], asked["instances brought up to date"]) == (0, 0)
    assert len(table_rows(made.settings, "instances")) == 8 * OF_A_STUDY
    assert len(table_rows(made.settings, "studies")) == 8
