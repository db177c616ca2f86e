"""What contradicts what, and that `conflicts` says so once, whatever the batches and their order."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import write_deltalake

from sphere.catalog.schema import TABLES
from sphere.conf.settings import Settings
from sphere.jobs import rollup
from sphere.jobs.contradictions import conflicts, contradicted
from sphere.jobs.tables import Tables
from tests.support.catalog import instance, write_table
from tests.support.landing import archive, table_rows

pytestmark = pytest.mark.unit

Found = list[tuple[Any, ...]]


def of(
    number: int, study: str = "1.1", series: str = "1.1.1", patient: str | None = "A", **more: Any
) -> dict[str, Any]:
    said = {"IssuerOfPatientID": None, "PatientBirthDate": None, "PatientSex": None, "Modality": "CT", **more}
    return instance(number, StudyInstanceUID=study, SeriesInstanceUID=series, PatientID=patient, **said)


CASES: dict[str, tuple[list[dict[str, Any]], Found]] = {
    "nothing": ([of(1), of(2, series="1.1.2", Modality="SR"), of(3, "1.2", "1.2.1", "B")], []),
    "two patients": ([of(1), of(2, patient="B"), of(3, patient="B")], [("STUDY_PATIENT", "1.1", 1, 2)]),
    "three patients": (
        [of(1), of(2, patient="B"), of(3, patient="C"), of(4)],
        [("STUDY_PATIENT", "1.1", 1, 2), ("STUDY_PATIENT", "1.1", 1, 3)],
    ),
    "no patient is no other one": ([of(1, patient=None), of(2), of(3, patient=""), of(4)], []),
    "two issuers": (
        [of(1), of(2, IssuerOfPatientID="X"), of(3, IssuerOfPatientID="Y")],
        [("STUDY_ISSUER", "1.1", 2, 3)],
    ),
    "a series in two studies": ([of(1), of(2, "1.2"), of(3, "1.2")], [("SERIES_STUDY", "1.1.1", 1, 2)]),
    "two modalities": ([of(1), of(2), of(3, Modality="MR")], [("SERIES_MODALITY", "1.1.1", 1, 3)]),
    "two birth dates": (
        [
            of(1),
            of(2, "1.2", "1.2.1", PatientBirthDate=date(1950, 1, 1)),
            of(3, "1.3", "1.3.1", PatientBirthDate=date(1950, 1, 2)),
        ],
        [("PATIENT_BIRTH_DATE", "1:A", 2, 3)],
    ),
    "two sexes in one study": ([of(1, PatientSex="F"), of(2, PatientSex="M")], [("PATIENT_SEX", "1:A", 1, 2)]),
    "another patient's birth date": (
        [of(1, PatientBirthDate=date(1950, 1, 1)), of(2, patient="B", PatientBirthDate=date(1960, 1, 1))],
        [("STUDY_PATIENT", "1.1", 1, 2)],
    ),
}


def found(settings: Settings) -> Found:
    rows = table_rows(settings, "conflicts")
    assert {row["decision"] for row in rows} <= {"recorded"}
    numbers = {(f"{n:064x}"): n for n in range(20)}
    return sorted(
        (row["kind"], row["subject"], numbers[row["kept_sha256"]], numbers[row["other_sha256"]]) for row in rows
    )


def extracted(settings: Settings, batches: Sequence[Sequence[dict[str, Any]]]) -> Found:
    for batch in batches:
        write_table(settings, TABLES["instances"], batch, "append")
        rollup.refresh(Tables(settings), settings, on_step=lambda name: None)
    return found(settings)


@pytest.mark.parametrize(("rows", "expected"), CASES.values(), ids=CASES)
def test_contradictions(rows: list[dict[str, Any]], expected: Found) -> None:
    owners = {row["StudyInstanceUID"]: row["PatientID"] for row in reversed(rows)}
    rows = [
        {**row, "patient_key": "1:A" if row["PatientID"] == owners[row["StudyInstanceUID"]] else None} for row in rows
    ]
    subjects = contradicted(rows)
    settled = [
        (row["kind"], row["subject"], int(row["kept_sha256"], 16), int(row["other_sha256"], 16))
        for row in conflicts(reversed(rows), subjects)
    ]
    assert sorted(settled) == expected
    assert not any(contradicted(rows[:1]).values())


@pytest.mark.parametrize("order", [1, -1])
def test_batches_and_their_order_do_not_matter(tmp_path: Path, order: int) -> None:
    """All contradictions at once, each in studies of its own: an instance a batch, forwards and backwards."""
    rows = [
        of(1),
        of(2, patient="B"),
        of(3, "1.2", "1.1.1", "C"),
        of(4, "1.3", "1.3.1", "D", Modality="CT", PatientBirthDate=date(1950, 1, 1)),
        of(5, "1.3", "1.3.1", "D", Modality="MR"),
        of(6, "1.4", "1.4.1", "D", PatientBirthDate=date(1960, 1, 1)),
    ]
    expected = [
        ("PATIENT_BIRTH_DATE", "1:D", 4, 6),
        ("SERIES_MODALITY", "1.3.1", 4, 5),
        ("SERIES_STUDY", "1.1.1", 1, 3),
        ("STUDY_PATIENT", "1.1", 1, 2),
    ]
    settings = archive(tmp_path / "an archive")
    assert extracted(settings, [[row] for row in rows[::order]]) == expected
    before = table_rows(settings, "conflicts")
    rollup.refresh(Tables(settings), settings, on_step=lambda name: None)
    assert table_rows(settings, "conflicts") == before


def test_what_was_put_right_is_no_longer_there(tmp_path: Path) -> None:
    settings = archive(tmp_path / "an archive")
    assert len(extracted(settings, [[of(1), of(2, patient="B"), of(3, "1.2")]])) == 2
    table = Tables(settings).ensure("instances")
    right = pa.Table.from_pylist([of(1), of(2), of(4, "1.2", "1.2.1")], schema=TABLES["instances"].schema)
    write_deltalake(table, right, mode="overwrite")
    rollup.refresh(Tables(settings), settings, on_step=lambda name: None)
    assert found(settings) == []


def test_what_contradicted_and_left_altogether_leaves_nothing(tmp_path: Path) -> None:
    """A patient of whom no study is left is in no roll-up any more, and in `conflicts` neither."""
    settings = archive(tmp_path / "an archive")
    born = [of(1, PatientBirthDate=date(1950, 1, 1)), of(2, "1.2", "1.1.1", PatientBirthDate=date(1960, 1, 1))]
    assert {kind for kind, *_ in extracted(settings, [[*born, of(3, "1.3", "1.3.1", "B")]])} == {
        "PATIENT_BIRTH_DATE",
        "SERIES_STUDY",
    }
    left = pa.Table.from_pylist([of(3, "1.3", "1.3.1", "B")], schema=TABLES["instances"].schema)
    write_deltalake(Tables(settings).ensure("instances"), left, mode="overwrite")
    rollup.refresh(Tables(settings), settings, on_step=lambda name: None)
    assert found(settings) == []
