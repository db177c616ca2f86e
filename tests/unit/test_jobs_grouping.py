"""Roll-ups in arrays, against the SQL of the same description."""

from __future__ import annotations

from dataclasses import replace
from datetime import date, datetime, timedelta, timezone
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sphere.catalog.rollup import description, roll_up_sql, source_columns
from sphere.catalog.schema import TABLES
from sphere.jobs.grouping import grouped, grown
from sphere.jobs.rolling import compute, grow
from tests.support.examples import examples

pytestmark = pytest.mark.unit

EPOCH = datetime(2026, 1, 1, tzinfo=timezone.utc)
TEXTS = ("", "a", "b", "B", "é", "日本", "\U0001f600", "a\\b", "10")


def values(type_: pa.DataType) -> st.SearchStrategy[Any]:
    """Few different ones, so that rows agree and differ."""
    if pa.types.is_list(type_):
        return st.lists(st.none() | values(type_.value_type), max_size=3)
    if pa.types.is_timestamp(type_):
        return st.integers(0, 3).map(lambda number: EPOCH + timedelta(microseconds=number))
    if pa.types.is_date(type_):
        return st.integers(0, 3).map(lambda number: date(2026, 1, 1 + number))
    if pa.types.is_integer(type_):
        return st.integers(-2, 2)
    if pa.types.is_floating(type_):
        return st.sampled_from([-1.5, 0.0, 2.25])
    return st.sampled_from(TEXTS)


@st.composite
def rows_of(draw: st.DrawFn, name: str) -> pa.Table:
    """Rows of the source of a roll-up, in one piece or two, without two of them in the same place of its order."""
    spec = description(name)
    schema = TABLES[spec.source].schema
    columns = list(source_columns(name))
    never = {*spec.keys, *spec.order, "length", "size_bytes"}
    silent = set(draw(st.lists(st.sampled_from(columns), max_size=len(columns)))) - never
    fields = {
        column: st.none()
        if column in silent
        else values(schema.field(column).type)
        if column in never
        else st.none() | values(schema.field(column).type)
        for column in columns
    }
    rows = draw(
        st.lists(
            st.fixed_dictionaries(fields),
            min_size=1,
            max_size=8,
            unique_by=lambda row: tuple(row[one] for one in spec.order),
        )
    )
    wanted = pa.schema([schema.field(column) for column in columns])
    cut = draw(st.integers(0, len(rows)))
    return pa.concat_tables([pa.Table.from_pylist(rows[:cut], wanted), pa.Table.from_pylist(rows[cut:], wanted)])


def by_key(name: str, rows: pa.Table) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = rows.to_pylist()
    return sorted(found, key=lambda row: tuple(row[key] for key in TABLES[name].key))


@pytest.mark.parametrize("name", ["series", "studies", "patients"])
@settings(max_examples=examples(25), deadline=None)
@given(data=st.data())
def test_arrays_and_sql_roll_up_alike(name: str, data: st.DataObject) -> None:
    rows = data.draw(rows_of(name))
    schema = TABLES[name].schema
    with duckdb.connect() as db:
        db.execute("SET TimeZone = 'UTC'")
        db.register("source", rows)
        expected = db.sql(roll_up_sql(name, "source")).to_arrow_table().select(schema.names).cast(schema)
    assert by_key(name, compute(name, rows)) == by_key(name, expected)
    silent = [column for column in description(name).attributes if not rows[column].is_valid().to_pylist().count(True)]
    kept = [column for column in rows.column_names if column not in silent or column in description(name).keys]
    assert compute(name, rows.select(kept)) == compute(name, rows)


@settings(max_examples=examples(25), deadline=None)
@given(data=st.data())
def test_what_grows_is_what_is_rolled_up_anew(data: st.DataObject) -> None:
    """Patients of studies that came before others, and then of all."""
    rows = data.draw(rows_of("patients")).sort_by("first_received_at")
    first = rows["first_received_at"].to_pylist()
    cut = data.draw(st.integers(0, len(rows)))
    while 0 < cut < len(rows) and first[cut] == first[cut - 1]:
        cut += 1
    before, more = compute("patients", rows.slice(0, cut)), compute("patients", rows.slice(cut))
    assert by_key("patients", grow("patients", before, more)) == by_key("patients", compute("patients", rows))


def test_rows_without_a_group_are_none() -> None:
    for name in ("series", "studies", "patients"):
        schema = TABLES[name].schema
        assert compute(name, TABLES[description(name).source].schema.empty_table()) == schema.empty_table()
        assert grow(name, schema.empty_table(), schema.empty_table()) == schema.empty_table()


def test_null_is_a_key_of_its_own() -> None:
    spec = replace(description("patients"), attributes=("PatientID",), aggregates=(), order=("first_received_at",))
    rows = pa.table(
        {
            "patient_key": pa.array(["a", None, "a", None]),
            "first_received_at": pa.array([3, 2, 1, 4], TABLES["studies"].schema.field("first_received_at").type),
            "PatientID": pa.array([None, "x", "y", "z"]),
        }
    )
    found = [{"patient_key": None, "PatientID": "x"}, {"patient_key": "a", "PatientID": "y"}]
    assert grouped(rows, spec).to_pylist() == found
    assert grown(rows, spec, order=spec.order).to_pylist() == found
