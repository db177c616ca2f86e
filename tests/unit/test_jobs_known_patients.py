"""Patients who come again: their rows are as if computed anew, and what that costs does not grow with the catalog."""

from __future__ import annotations

import random
from collections import Counter
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from sphere.catalog.schema import TABLES
from sphere.conf.settings import Settings
from sphere.ingest.storage.local import LocalStorage
from sphere.jobs import rollup, wholes
from sphere.jobs import tables as module
from sphere.jobs.rolling import COLUMNS, Rolled
from sphere.jobs.rolling import roll_up as roll_up_rows
from sphere.jobs.tables import Tables
from tests.support.catalog import EPOCH, instance, roll_up, write_table
from tests.support.examples import examples
from tests.support.landing import archive, table_rows

pytestmark = pytest.mark.unit

Row = dict[str, Any]


def instances_of(number: int, patient: str | None, **attributes: Any) -> list[Row]:
    """Two instances of a study of its own; the second one says less."""
    uids = {"StudyInstanceUID": f"1.9.{number}", "SeriesInstanceUID": f"1.9.{number}.1", "Modality": "CT"}
    first = instance(2 * number, PatientID=patient, IssuerOfPatientID=None, **uids, **attributes)
    second = instance(2 * number + 1, PatientID=patient, IssuerOfPatientID=None, **uids)
    return [first, {**second, "received_at": first["received_at"]}]


def extract(settings: Settings, rows: list[Row], *, rolled: bool, tables: Tables | None = None) -> None:
    """One batch: rows into `instances`, and the roll-ups, by way of what tasks rolled up or of the change feed; with
    `tables` that are open from the batch before."""
    tables = tables or Tables(settings)
    tables.look_again()
    onto = Tables(settings).ensure("instances").version()
    write_table(settings, TABLES["instances"], rows, "append")
    found = pa.Table.from_pylist(rows, schema=TABLES["instances"].schema)
    piece = Rolled.unpack(**roll_up_rows(found.select(COLUMNS)).pack())
    added = rollup.Added(onto, [piece]) if rolled else None
    rollup.refresh(tables, settings, on_step=lambda name: None, added=added)


def sorted_rows(settings: Settings, name: str) -> list[str]:
    return sorted(str(sorted(row.items())) for row in table_rows(settings, name))


def check_alike(grown: Settings, anew: Settings) -> None:
    for name in ("patients", "studies", "series", "conflicts"):
        if name != "conflicts" or DeltaTable.is_deltatable(f"{anew.catalog_root}/conflicts"):
            assert sorted_rows(grown, name) == sorted_rows(anew, name), name


@pytest.mark.parametrize("seed", range(examples(3)))
def test_rows_are_as_if_computed_anew(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Studies before, at and after what a patient had; a few of them say what nobody else says."""
    chance = random.Random(seed)
    grown, anew = archive(tmp_path / "grown"), archive(tmp_path / "anew")
    tables = Tables(grown)
    if seed:  # files are not joined, but written anew
        monkeypatch.setattr(module, "SMALL", 0)
    for batch in range(6):
        rows: list[Row] = []
        for number in range(8):
            late = chance.choice((100 * batch, 100 * batch, 100 * batch, 50, 0))
            patient = chance.choice("ABCDEFGH")
            birth = date(1950, 1, 1 + ord(patient) - ord("A") + (chance.random() < 0.02))
            rows += instances_of(
                10 * batch + number, patient,
                received_at=EPOCH + timedelta(seconds=late),
                PatientBirthDate=chance.choice((None, birth)), PatientSex=chance.choice((None, "F")),
                PatientName=chance.choice((None, "Doe^J", "Doe^Jane")),
                PatientComments=chance.choice((None, None, f"{batch}")),
                collections=chance.choice((None, ["x"], ["y", "z"])),
            )  # fmt: skip
        extract(grown, rows, rolled=True, tables=tables)
        extract(anew, rows, rolled=False)
        check_alike(grown, anew)
    spec = TABLES["patients"].roll_up
    assert spec is not None
    expected = roll_up(spec, table_rows(grown, "studies"))
    assert sorted_rows(grown, "patients") == sorted(str(sorted(row.items())) for row in expected)


def test_of_studies_of_one_moment_the_first_by_uid_speaks(tmp_path: Path) -> None:
    settings = archive(tmp_path / "archive")
    for number, name in ((5, "Doe^J"), (10, "Doe^Jane")):  # 1.9.10 comes before 1.9.5
        extract(settings, instances_of(number, "A", received_at=EPOCH, PatientName=name), rolled=True)
    [row] = table_rows(settings, "patients")
    assert (row["PatientName"], row["NumberOfPatientRelatedStudies"]) == ("Doe^Jane", 2)


@pytest.mark.parametrize("other", [None, "Y"])
def test_what_an_instance_of_nobody_or_of_another_patient_said_counts(tmp_path: Path, other: str | None) -> None:
    """The patient's row has its birth date from there; the second study says another one, and the third does not."""
    grown, anew = archive(tmp_path / "grown"), archive(tmp_path / "anew")
    first = instances_of(1, "X")
    first[1] |= {"PatientID": other, "PatientBirthDate": date(1950, 1, 1)}
    for rows in (
        first,
        instances_of(2, "X", PatientBirthDate=date(1960, 1, 1)),
        instances_of(3, "X", PatientBirthDate=date(1950, 1, 1)),
    ):
        extract(grown, rows, rolled=True)
        extract(anew, rows, rolled=False)
        check_alike(grown, anew)
    found = [row["StudyInstanceUID"] for row in table_rows(grown, "conflicts") if row["kind"] == "PATIENT_BIRTH_DATE"]
    assert found == [["1.9.2"], ["1.9.3"]][other is not None]


def opened(settings: Settings, rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> tuple[Counter[str], Counter[str]]:
    """Files and bytes, by table, that a batch reads (bytes) and writes (with a + before the table's name)."""
    files: dict[str, set[str]] = {}
    size: Counter[str] = Counter()
    read, write = LocalStorage.read, LocalStorage.write

    def count(name: str, path: str, data: bytes) -> None:
        if path.endswith(".parquet"):
            files.setdefault(name, set()).add(path)
            size[name] += len(data)

    def reads(self: LocalStorage, path: str, offset: int = 0, length: int | None = None) -> bytes:
        data = read(self, path, offset, length)
        count(path.partition("/")[0], path, data)
        return data

    def writes(self: LocalStorage, path: str, data: bytes) -> None:
        write(self, path, data)
        count("+" + path.partition("/")[0], path, data)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "read", reads)
        patch.setattr(LocalStorage, "write", writes)
        extract(settings, rows, rolled=True)
    return Counter({name: len(paths) for name, paths in files.items()}), size


def test_patients_who_come_again_cost_the_same_in_a_larger_catalog(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has the file of `patients` written anew that holds it, no other; `studies` is not searched."""
    monkeypatch.setattr(module, "file_rows", lambda name: 50)
    monkeypatch.setattr(module, "SMALL", 0)  # no file is joined with others
    costs = []
    for studies in (200, 1200):
        settings = archive(tmp_path / f"{studies}")
        rows = [row for number in range(studies) for row in instances_of(number, f"P{number:05}")]
        extract(settings, rows, rolled=True)
        extract(settings, instances_of(studies, "P00000"), rolled=True)  # the keys are known from here on
        again = [f"P{number:05}" for number in (studies // 10, studies // 2, studies - 1)]
        coming = [row for at, patient in enumerate(again, studies + 1) for row in instances_of(at, patient)]
        costs.append(opened(settings, coming, monkeypatch))
        assert {row["NumberOfPatientRelatedStudies"] for row in table_rows(settings, "patients")} == {1, 2}
    (few, few_bytes), (many, many_bytes) = costs
    assert few == many
    assert many["patients"] == many["+patients"] == 3
    assert "studies" not in many or many["studies"] <= 1  # what the batch before added, for its keys
    for name, size in few_bytes.items():
        assert many_bytes[name] < 1.2 * size, name


@pytest.mark.parametrize(("kept", "times"), [(wholes.KEPT, 1), (0, 2)])
def test_a_file_is_read_once_for_its_rows_and_their_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int, times: int
) -> None:
    """And again where no more may be kept, whether it was foreseen or not."""
    monkeypatch.setattr(module, "file_rows", lambda name: 5)
    monkeypatch.setattr(module, "SMALL", 0)
    monkeypatch.setattr(wholes, "KEPT", kept)
    settings = archive(tmp_path / "archive")
    rows = [{"patient_key": f"1:{number:02}", "NumberOfPatientRelatedStudies": 1} for number in range(40)]
    Tables(settings).merge("patients", rows)
    known = Tables(settings)
    known.find("patients", ("patient_key",), key="patient_key", values=["1:00"], at=known.open("patients"))
    read = LocalStorage.read
    for foreseen in (False, True):
        paths: Counter[str] = Counter()
        tables = Tables(settings)

        def counted(self: LocalStorage, path: str, *args: Any, paths: Counter[str] = paths) -> bytes:
            if path.endswith(".parquet"):
                paths[path] += 1
            return read(self, path, *args)

        with monkeypatch.context() as patch:
            patch.setattr(LocalStorage, "read", counted)
            keys = ["1:03", "1:21", "1:22"]
            if foreseen:
                tables.foresee("patients", keys)
            found = tables.find_to_merge("patients", keys, at=tables.open("patients"))
            assert sorted(found["patient_key"].to_pylist()) == keys
            more = [
                {**row, "NumberOfPatientRelatedStudies": row["NumberOfPatientRelatedStudies"] + 1}
                for row in found.to_pylist()
            ]
            tables.merge("patients", more)
        assert sorted(paths.values()) == [times] * 2
        known.find("patients", ("patient_key",), key="patient_key", values=["1:00"], at=known.open("patients"))
    counts = {row["patient_key"]: row["NumberOfPatientRelatedStudies"] for row in table_rows(settings, "patients")}
    assert counts == {row["patient_key"]: 3 if row["patient_key"] in keys else 1 for row in rows}


def model(rows: list[Row], coming: list[Row], gone: list[Row], key: tuple[str, ...]) -> list[Row]:
    """What a merge is of."""
    kept = {tuple(row[name] for name in key): row for row in rows}
    for row in gone:
        kept.pop(tuple(row[name] for name in key), None)
    kept |= {tuple(row[name] for name in key): row for row in coming}
    return list(kept.values())


@pytest.mark.parametrize("small", [0, 1 << 30])
@pytest.mark.parametrize("name", ["patients", "series", "bundles"])
def test_merges_give_what_a_dictionary_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, small: int
) -> None:
    """In place and by joining; values that come into columns that said nothing, lists, null, and keys that leave."""
    monkeypatch.setattr(module, "file_rows", lambda name: 7)
    monkeypatch.setattr(module, "SMALL", small)
    chance = random.Random(7)
    settings = archive(tmp_path / "archive")
    key, names = TABLES[name].key, TABLES[name].schema.names
    texts = [one for one in names if TABLES[name].schema.field(one).type == pa.string() and one not in key]
    numbers = [one for one in names if TABLES[name].schema.field(one).type == pa.int64()]

    def some(count: int) -> list[Row]:
        keys = chance.sample(range(40), count)
        rows = [{**dict.fromkeys(names), **{one: f"{at // 3 if one == key[0] else at}" for one in key}} for at in keys]
        rows = list({tuple(row[one] for one in key): row for row in rows}.values())
        for row in rows:
            row |= {one: chance.choice((None, "a", "bc")) for one in chance.sample(texts, min(2, len(texts)))}
            row |= {one: chance.choice((None, 5, 1 << 40)) for one in numbers}
            if "collections" in names:
                row["collections"] = chance.choice((None, ["x"], ["y", "z"]))
        return rows

    tables, held = Tables(settings), list[Row]()
    for _ in range(12):
        coming, gone = some(9), some(3)
        tables.merge(name, coming, gone=gone)
        held = model(held, coming, gone, key)
        assert sorted_rows(settings, name) == sorted(str(sorted(row.items())) for row in held)
        wanted = coming[0][key[0]]
        found = Tables(settings).find(name, key, key=key[0], values=[wanted], at=tables.open(name))  # keys of before
        assert len(found) == sum(row[key[0]] == wanted for row in held)
        found = tables.find(name, key, key=key[0], values=[wanted], at=tables.open(name))
        assert len(found) == sum(row[key[0]] == wanted for row in held)


def test_a_file_written_anew_keeps_its_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it is read to know them, but where a value came that it did not have: another patient of a study."""
    monkeypatch.setattr(module, "SMALL", 0)
    settings = archive(tmp_path / "archive")
    tables = Tables(settings)
    studies = [{"StudyInstanceUID": f"1.{at}", "patient_key": f"1:{at % 3}"} for at in range(9)]
    tables.merge("studies", studies)
    find = {"key": "patient_key", "values": ["1:7"]}
    assert len(tables.find("studies", ("StudyInstanceUID",), at=tables.open("studies"), **find)) == 0
    tables.merge("studies", [{**studies[4], "StudyDescription": "said later"}])
    read = LocalStorage.read
    paths: list[str] = []
    monkeypatch.setattr(
        LocalStorage, "read", lambda self, path, *args: (paths.append(path), read(self, path, *args))[1]
    )
    assert len(tables.find("studies", ("StudyInstanceUID",), at=tables.open("studies"), **find)) == 0
    assert not [path for path in paths if path.endswith(".parquet")]
    tables.merge("studies", [{**studies[4], "patient_key": "1:7"}])
    found = tables.find("studies", ("StudyInstanceUID",), at=tables.open("studies"), **find)
    assert found.to_pylist() == [{"StudyInstanceUID": "1.4"}]
