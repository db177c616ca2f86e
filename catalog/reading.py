"""SQL that reads the Parquet files of a table, of which each has only the columns that say something."""

from __future__ import annotations

from collections.abc import Iterable

from sphere.catalog.rollup import duckdb_type
from sphere.catalog.schema import TABLES


def files_sql(name: str, columns: Iterable[str]) -> str:
    """A relation of files of the table `name`, whose paths are its one value; null where none of them has one of
    `columns` (of the table's schema; others are left out)."""
    schema = TABLES[name].schema
    types = {field.name: field.type for field in schema}
    nulls = ", ".join(f'NULL::{duckdb_type(types[column])} AS "{column}"' for column in columns if column in types)
    read = "FROM read_parquet(?, union_by_name = true)"
    return f"({read} UNION ALL BY NAME SELECT {nulls} WHERE false)" if nulls else f"({read})"
