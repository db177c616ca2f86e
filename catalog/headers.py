"""Headers of entities above IMAGE level: what no column holds, read from the `dataset` of their instances.

Each attribute is the one of the entity's earliest instance (by received_at, bundle, offset) where it has a value, as in
the roll-ups. Cost: every instance of the entities in question is read, of the files that hold their studies only; a
query that no other key narrows reads the whole of `instances`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import duckdb
import orjson

from sphere.catalog.index import Index
from sphere.catalog.match_header import Header
from sphere.catalog.plan import ORDER
from sphere.catalog.predicate import AnyItem, Compare, Moment, Predicate
from sphere.catalog.schema import Level

Row = tuple[Any, ...]


def tags_of(predicate: Predicate) -> set[int]:
    """The tags of the first level that a predicate looks at."""
    tags: set[int] = set()
    for node in predicate:
        if isinstance(node, Moment):
            tags |= {node.date_tag, node.time_tag}
        elif isinstance(node, (Compare, AnyItem)):
            tags.add(node.tag)
    return tags


def read_headers(
    index: Index, cursor: duckdb.DuckDBPyConnection, level: Level, keys: Sequence[Row], tags: Iterable[int]
) -> Mapping[Row, Header]:
    """From the identifying values (`ORDER[level]`) of entities to a DICOM JSON object of the `tags` they have."""
    names = [f"{tag:08X}" for tag in sorted(tags)]
    studies = _studies(cursor, level, keys)
    columns = ("StudyInstanceUID", "SeriesInstanceUID", "received_at", "bundle", "offset", "dataset")
    instances = index.instances(index.instance_files(studies), columns)
    if instances is None or not names:
        return {}
    source, identity = _source(level, instances[0])
    elements = ", ".join(map(_element_sql, names))
    text = (
        f"SELECT {', '.join(identity)}, {elements} FROM {source} "
        f"WHERE i.StudyInstanceUID IN ({', '.join('?' * len(studies))}) GROUP BY ALL"
    )
    width = len(identity)
    headers: dict[Row, Header] = {}
    for row in cursor.execute(text, [*instances[1], *studies]).fetchall():
        found = zip(names, row[width:], strict=True)
        headers[row[:width]] = {name: orjson.loads(element) for name, element in found if element is not None}
    return headers


def _studies(cursor: duckdb.DuckDBPyConnection, level: Level, keys: Sequence[Row]) -> list[str]:
    """The studies of some patients, studies or series."""
    if level != "PATIENT":
        return sorted({row[0] for row in keys})
    sql = "SELECT StudyInstanceUID FROM studies WHERE patient_key IN (SELECT unnest(?::VARCHAR[])) ORDER BY ALL"
    return [row[0] for row in cursor.execute(sql, [[row[0] for row in keys]]).fetchall()]


def _source(level: Level, instances: str) -> tuple[str, tuple[str, ...]]:
    files = f"{instances} i"
    if level == "PATIENT":
        return f"{files} JOIN studies t ON t.StudyInstanceUID = i.StudyInstanceUID", ("t.patient_key",)
    return files, tuple(column.replace(column.partition(".")[0], "i", 1) for column in ORDER[level])


def _element_sql(name: str) -> str:
    """The element of the earliest instance where it has a value. `name` is a tag in hexadecimal, never user text."""
    element = f"""json_extract(i."dataset", '$."{name}"')"""
    value = f"""json_extract(i."dataset", '$."{name}".Value[0]')"""
    return f'first({element} ORDER BY i.received_at, i.bundle, i."offset") FILTER ({value} IS NOT NULL)'
