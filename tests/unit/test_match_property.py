"""One matcher: over generated headers and queries, SQL over columns and the evaluation of headers answer alike."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from sphere.catalog.match_header import holds
from sphere.catalog.plan import Columns
from sphere.catalog.predicate import ColumnSql, compile_sql
from sphere.catalog.query import Query
from sphere.catalog.schema import BY_KEYWORD, TABLES
from sphere.conf.errors import QueryError
from tests.support.catalog import header
from tests.support.examples import examples

pytestmark = pytest.mark.unit

ALPHABET = "abAB%_*?.\\^= éÉßİΣ山[]()'\n"
TEXT = st.text(ALPHABET, max_size=6)
DIGITS = st.text("0123456789:.+-", max_size=8)
UIDS = st.sampled_from(["1.2", "1.2.3", "1.2.30", "1.20"])
DAYS = st.dates(date(2023, 12, 28), date(2024, 1, 4))
TIMES = st.sampled_from(["10", "1000", "100000", "100000.5", "10:00:30", "0959", "235960", "2460", "100059.999999"])
MOMENTS = st.builds(
    lambda day, time, zone: f"{day:%Y%m%d}{time}{zone}"[: None if zone else 14],
    DAYS,
    st.sampled_from(["", "10", "1030", "103000", "103000.25", "235959.999999"]),
    st.sampled_from(["", "+0100", "-0030", "+0000"]),
)
NAMES = st.text(ALPHABET.replace("\\", "").replace("\n", ""), max_size=8).filter(lambda name: name.count("=") < 3)

STORED: dict[str, st.SearchStrategy[Any]] = {
    "SOPInstanceUID": UIDS,
    "ImageType": st.lists(TEXT, max_size=3),
    "InstanceNumber": st.integers(-3, 3),
    "ContentDate": DAYS,
    "ContentTime": TIMES | DIGITS,
    "AcquisitionDateTime": MOMENTS | DIGITS,
    "ImageComments": TEXT,
    "ContentCreatorName": NAMES,
    "SliceThickness": st.sampled_from([0.5, 1.0, 1.25, -2.0]),
    "PixelSpacing": st.lists(st.sampled_from([0.5, 1.25]), max_size=2),
}
RANGED = {"ContentDate": DAYS.map(lambda day: f"{day:%Y%m%d}"), "ContentTime": TIMES, "AcquisitionDateTime": MOMENTS}


def ranges(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        values,
        values.map(lambda value: f"{value}-"),
        values.map(lambda value: f"-{value}"),
        st.tuples(values, values).map("-".join),
    )


ASKED: dict[str, st.SearchStrategy[str]] = {
    "SOPInstanceUID": st.lists(UIDS, min_size=1, max_size=3).map("\\".join),
    "ImageType": TEXT,
    "InstanceNumber": st.integers(-3, 3).map(str),
    "ImageComments": TEXT,
    "ContentCreatorName": NAMES,
    "SliceThickness": st.sampled_from(["0.5", "1", "1.250", "-2e0"]),
    "PixelSpacing": st.sampled_from(["0.5", "1.25"]),
    **{keyword: ranges(values) for keyword, values in RANGED.items()},
}
ROWS = st.lists(st.fixed_dictionaries({}, optional=STORED), min_size=1, max_size=8)
MATCH = st.fixed_dictionaries({}, optional=ASKED)
SCHEMA = pa.schema([("number", pa.int64()), *((name, BY_KEYWORD[name].arrow) for name in STORED)])


@pytest.fixture(scope="module")
def database() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as connection:
        yield connection


def by_sql(database: duckdb.DuckDBPyConnection, query: Query, rows: list[dict[str, Any]]) -> list[int]:
    table = pa.Table.from_pylist([{"number": number, **row} for number, row in enumerate(rows)], schema=SCHEMA)
    database.register("i", table)
    columns = Columns("IMAGE", frozenset(TABLES["instances"].schema.names))
    compiled = compile_sql(query.predicate(), columns.resolve)
    assert compiled.rest == ()
    sql = f"SELECT number FROM i WHERE {compiled.where} ORDER BY number"
    return [row[0] for row in database.execute(sql, list(compiled.values)).fetchall()]


def by_headers(query: Query, rows: list[dict[str, Any]]) -> list[int]:
    return [number for number, row in enumerate(rows) if holds(query.predicate(), header(row))]


@settings(max_examples=examples(200), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, match=MATCH, combined=st.booleans())
def test_sql_and_headers_agree(
    database: duckdb.DuckDBPyConnection, rows: list[dict[str, Any]], match: dict[str, str], combined: bool
) -> None:
    try:
        query = Query.build("IMAGE", match, combined_datetime=combined)
    except QueryError:
        assume(False)
    assert by_sql(database, query, rows) == by_headers(query, rows)


@settings(max_examples=examples(200), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, keyword=st.sampled_from(sorted(ASKED)), data=st.data())
def test_each_key_by_itself(
    database: duckdb.DuckDBPyConnection, rows: list[dict[str, Any]], keyword: str, data: st.DataObject
) -> None:
    try:
        query = Query.build("IMAGE", {keyword: data.draw(ASKED[keyword])})
    except QueryError:
        assume(False)
    assert by_sql(database, query, rows) == by_headers(query, rows)


@settings(max_examples=examples(100), deadline=None)
@given(items=st.lists(st.fixed_dictionaries({}, optional={k: STORED[k] for k in ("ImageComments", "ContentDate")})))
def test_sequence_matching_is_that_of_its_items(items: list[dict[str, Any]]) -> None:
    match = {"ImageComments": "a*", "ContentDate": "20240101-"}
    nested = Query.build("IMAGE", {"RequestAttributesSequence": match}).predicate()
    flat = Query.build("IMAGE", match).predicate()
    whole = {"00400275": {"vr": "SQ", "Value": [header(item) for item in items]}}
    assert holds(nested, whole) == any(holds(flat, header(item)) for item in items)


def test_what_no_column_holds_is_left_to_headers() -> None:
    match = {"00091001": "x", "RequestAttributesSequence": {"RequestedProcedureID": "R"}, "InstanceNumber": "1"}
    compiled = compile_sql(Query.build("IMAGE", match).predicate(), _column)
    assert [node.tag for node in compiled.rest if hasattr(node, "tag")] == [0x00091001, 0x00400275]
    assert compiled.conditions == ("n = ?",)


def _column(keyword: str) -> ColumnSql | None:
    return ColumnSql("n") if keyword == "InstanceNumber" else None
