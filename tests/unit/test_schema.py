"""The tables' schemas: what Delta's statistics cover, where attributes live, how roll-ups are described."""

from __future__ import annotations

import duckdb
import pyarrow as pa
import pytest

from sphere.catalog.schema import (
    ATTRIBUTES,
    BY_KEYWORD,
    COMPUTED,
    INSTANCE_FIELDS,
    PATIENT_KEY_SQL,
    TABLES,
    UNIQUE_KEY,
    Level,
    level_of,
    patient_key,
)
from sphere.ingest.header.columns import COLUMNS

pytestmark = pytest.mark.unit

STATISTICS = 32  # columns of a Delta table with minimum and maximum


def test_instances_hold_every_column_once() -> None:
    names = TABLES["instances"].schema.names
    assert len(set(names)) == len(names)
    assert set(names) == {column.keyword for column in COLUMNS} | set(INSTANCE_FIELDS) | {"dataset"}
    assert names[-1] == "dataset"
    assert names[:4] == ["SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID"]
    assert set(INSTANCE_FIELDS) - {"collections"} <= set(names[:STATISTICS])  # a list has no bounds


@pytest.mark.parametrize("name", TABLES)
def test_keys_come_first_and_timestamps_are_utc(name: str) -> None:
    table = TABLES[name]
    assert table.schema.names[: len(table.key)] == list(table.key)
    for field in table.schema:
        assert not pa.types.is_timestamp(field.type) or field.type == pa.timestamp("us", tz="UTC")


@pytest.mark.parametrize("name", ["series", "studies", "patients"])
def test_roll_ups_are_described_in_full(name: str) -> None:
    roll_up = TABLES[name].roll_up
    assert roll_up is not None
    described = {*roll_up.keys, *roll_up.attributes, *(aggregate.column for aggregate in roll_up.aggregates)}
    computed = {"patient_key"} if name == "studies" else set()
    assert described | computed == set(TABLES[name].schema.names)
    source = set(TABLES[roll_up.source].schema.names)
    sources = {aggregate.source for aggregate in roll_up.aggregates if aggregate.source}
    assert {*roll_up.keys, *roll_up.order, *roll_up.attributes, *sources} <= source


@pytest.mark.parametrize(
    ("keyword", "level"),
    [
        ("PatientID", "PATIENT"),
        ("PatientAge", "STUDY"),
        ("StudyDate", "STUDY"),
        ("ModalitiesInStudy", "STUDY"),
        ("Modality", "SERIES"),
        ("Manufacturer", "SERIES"),
        ("FrameOfReferenceUID", "SERIES"),
        ("SOPInstanceUID", "IMAGE"),
        ("ImageType", "IMAGE"),
        ("PixelPaddingValue", "IMAGE"),
        ("RequestAttributesSequence", None),
        ("", None),
    ],
)
def test_level_of(keyword: str, level: Level | None) -> None:
    assert level_of(keyword) == level


def test_computed_keys_are_columns_of_their_level_only() -> None:
    tables = {"PATIENT": "patients", "STUDY": "studies", "SERIES": "series"}
    for keyword, level in COMPUTED.items():
        assert keyword not in BY_KEYWORD
        assert keyword in TABLES[tables[level]].schema.names
    for level, names in ATTRIBUTES.items():
        assert names[0] == UNIQUE_KEY[level]


@pytest.mark.parametrize("patient_id", [None, "", "P1", "山田", "1:P"])
@pytest.mark.parametrize("issuer", [None, "", "HOSPITAL"])
def test_patient_key(patient_id: str | None, issuer: str | None) -> None:
    source = "(SELECT ? AS PatientID, ? AS IssuerOfPatientID, '9.1' AS StudyInstanceUID)"
    with duckdb.connect() as database:
        [(found,)] = database.execute(f"SELECT {PATIENT_KEY_SQL} FROM {source}", [patient_id, issuer]).fetchall()
    assert found == patient_key(patient_id, issuer, "9.1")
    assert found.startswith("0:9.1") != bool(patient_id)
