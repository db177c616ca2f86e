"""SQL that reads the files of `instances`, of which each has only the columns that say something."""

from __future__ import annotations

from collections.abc import Iterable

from sphere.catalog.grant import Grant
from sphere.catalog.rollup import duckdb_type
from sphere.catalog.schema import TABLES


def instances_sql(columns: Iterable[str], grant: Grant | None = None) -> str:
    """A relation of files of `instances`, whose paths are its one value, with at least `columns`: null where no file
    has one. With a `grant`, which the database has attached, of what is granted alone."""
    schema = TABLES["instances"].schema
    names = dict.fromkeys([*columns, *(grant.columns if grant else ())])
    nulls = ", ".join(f'NULL::{duckdb_type(schema.field(name).type)} AS "{name}"' for name in names)
    files = f"(FROM read_parquet(?, union_by_name = true) UNION ALL BY NAME SELECT {nulls} WHERE false)"
    return f"(SELECT * FROM {files} WHERE {grant.condition(_quoted)})" if grant else files


def _quoted(name: str) -> str:
    return f'"{name}"'
