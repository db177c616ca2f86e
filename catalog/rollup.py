"""The roll-ups as DuckDB SQL, from their description in the schema; extraction and recent arrivals share it."""

from __future__ import annotations

from collections.abc import Container, Mapping

import pyarrow as pa

from sphere.catalog.schema import BY_KEYWORD, PATIENT_KEY_SQL, TABLES, Aggregate, RollUp

MARK = "sphere.rollup"
"""Application of the Delta transaction identifier by which a roll-up says which version of `instances` it shows."""

_SQL: Mapping[str, str] = {
    "count": "count(*)",
    "count_distinct": 'count(DISTINCT "{0}")',
    "collect_set": 'list_sort(list(DISTINCT "{0}") FILTER ("{0}" IS NOT NULL))',
    "union": 'nullif(list_sort(list_distinct(flatten(list("{0}") FILTER ("{0}" IS NOT NULL)))), [])',
    "sum": 'sum("{0}")',
    "min": 'min("{0}")',
    "max": 'max("{0}")',
}


def roll_up_sql(name: str, source: str, *, absent: Container[str] = ()) -> str:
    """A SELECT that gives the rows of the roll-up `name` from the relation `source`, which has `source_columns`.

    Attributes that are `absent` are null in every row of `source`: it need not have their columns.
    """
    roll_up = description(name)
    keys = ", ".join(f'"{key}"' for key in roll_up.keys)
    order = ", ".join(f'"{column}"' for column in roll_up.order)
    chosen = [
        f'{_null(column) if column in absent else _first(column)} AS "{column}"'
        for column in roll_up.attributes
        if column not in roll_up.keys
    ]
    chosen += [f'{_sql(aggregate)} AS "{aggregate.column}"' for aggregate in roll_up.aggregates]
    rows = f"(SELECT *, row_number() OVER (ORDER BY {order}) AS place FROM {source})"
    grouped = f"SELECT {keys}, {', '.join(chosen)} FROM {rows} GROUP BY {keys}"
    patient = f", {PATIENT_KEY_SQL.replace('AS STRING', 'AS VARCHAR')} AS patient_key" if name == "studies" else ""
    return f"SELECT *{patient} FROM ({grouped})"


def source_columns(name: str) -> dict[str, None]:
    """Columns of the source that a roll-up needs, in order."""
    roll_up = description(name)
    sources = (aggregate.source for aggregate in roll_up.aggregates if aggregate.source)
    return dict.fromkeys((*roll_up.keys, *roll_up.order, *roll_up.attributes, *sources))


def optional_columns(*names: str) -> frozenset[str]:
    """Those of the source of these roll-ups that may be `absent` from it where they are null in every row."""
    roll_ups = [description(name) for name in names]
    return frozenset(attribute for one in roll_ups for attribute in one.attributes).difference(
        *(one.keys for one in roll_ups), (aggregate.source for one in roll_ups for aggregate in one.aggregates)
    )


def description(name: str) -> RollUp:
    """How the table follows from another."""
    roll_up = TABLES[name].roll_up
    assert roll_up is not None
    return roll_up


def duckdb_type(arrow: pa.DataType) -> str:
    """The DuckDB type of a column of the catalog."""
    if pa.types.is_list(arrow):
        return f"{duckdb_type(arrow.value_type)}[]"
    for is_kind, name in _TYPES:
        if is_kind(arrow):
            return name
    return "VARCHAR"


_TYPES = (
    (pa.types.is_timestamp, "TIMESTAMPTZ"),
    (pa.types.is_integer, "BIGINT"),
    (pa.types.is_floating, "DOUBLE"),
    (pa.types.is_date, "DATE"),
    (pa.types.is_boolean, "BOOLEAN"),
)


def _first(keyword: str) -> str:
    return f'arg_min("{keyword}", place)'


def _null(keyword: str) -> str:
    return f"CAST(NULL AS {duckdb_type(BY_KEYWORD[keyword].arrow)})"


def _sql(aggregate: Aggregate) -> str:
    return f"CAST({_SQL[aggregate.kind].format(aggregate.source)} AS {duckdb_type(aggregate.arrow)})"
