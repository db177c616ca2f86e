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

from sphere.catalog.layers import Layer
from sphere.catalog.match_header import Header, tag_in
from sphere.catalog.plan import ORDER
from sphere.catalog.predicate import Moment, Predicate
from sphere.catalog.schema import Level

Row = tuple[Any, ...]
PRIVATE_PAGE = 64
"""Headers held at once while private attributes are looked for: they are read whole."""


Attribute = tuple[int, str]
"""A tag, and the private creator whose block it is in ("" where none is named)."""


def attributes_of(predicate: Predicate) -> set[Attribute]:
    """The attributes of the first level that a predicate looks at."""
    found: set[Attribute] = set()
    for node in predicate:
        if isinstance(node, Moment):
            found |= {(node.date_tag, ""), (node.time_tag, "")}
        else:
            found.add((node.tag, node.creator))
    return found


def read_headers(
    layer: Layer, cursor: duckdb.DuckDBPyConnection, level: Level, keys: Sequence[Row], wanted: Iterable[Attribute]
) -> Mapping[Row, Header]:
    """From the identifying values (`ORDER[level]`) of entities to a DICOM JSON object of the attributes they have.

    A private attribute of a named creator stands in the block that the query gives it.
    """
    attributes = sorted(wanted)
    names = [f"{tag:08X}" for tag, creator in attributes if not creator]
    private = [attribute for attribute in attributes if attribute[1]]
    studies = _studies(cursor, level, keys)
    columns = ("StudyInstanceUID", "SeriesInstanceUID", "received_at", "bundle", "offset", "dataset")
    instances = layer.instances(layer.instance_files(studies), columns)
    if instances is None or not attributes:
        return {}
    source, identity = _source(level, instances[0])
    where = f"FROM {source} WHERE i.StudyInstanceUID IN ({', '.join('?' * len(studies))})"
    values = [*instances[1], *studies]
    headers: dict[Row, dict[str, Any]] = {}
    if names:
        text = f"SELECT {', '.join([*identity, *map(_element_sql, names)])} {where} GROUP BY ALL"
        for row in cursor.execute(text, values).fetchall():
            found = zip(names, row[len(identity) :], strict=True)
            headers[row[: len(identity)]] = {name: orjson.loads(one) for name, one in found if one is not None}
    if private:
        _add_private(headers, cursor, private, (f'{", ".join(identity)}, i."dataset" {where}', values))
    return headers


def _add_private(
    headers: dict[Row, dict[str, Any]],
    cursor: duckdb.DuckDBPyConnection,
    private: Sequence[Attribute],
    selected: tuple[str, list[Any]],
) -> None:
    """Add private attributes of named creators from whole headers: `selected` is what gives them, and its values."""
    text, values = selected
    creators = sorted({creator for _, creator in private})
    named = " OR ".join(['contains(i."dataset", ?)'] * len(creators))  # the rest need not be parsed
    values = [*values, *(orjson.dumps(creator).decode()[1:-1] for creator in creators)]
    cursor.execute(f'SELECT {text} AND ({named}) ORDER BY i.received_at, i.bundle, i."offset"', values)
    while rows := cursor.fetchmany(PRIVATE_PAGE):
        for row in rows:
            take_private(headers.setdefault(row[:-1], {}), orjson.loads(row[-1] or b"{}"), private)


def take_private(found: dict[str, Any], header: Header, wanted: Iterable[Attribute]) -> None:
    """Add the private attributes that `header` has a value of and `found` has not, in the blocks of `wanted`."""
    for tag, creator in wanted:
        element = header.get(f"{tag_in(header, tag, creator):08X}")
        if element and f"{tag:08X}" not in found and _has_value(element):
            found[f"{tag:08X}"] = element
            found[f"{tag >> 16:04X}00{tag >> 8 & 0xFF:02X}"] = {"vr": "LO", "Value": [creator]}


def _has_value(element: Mapping[str, Any]) -> bool:
    """Whether an element has a first value, which may be 0."""
    return "InlineBinary" in element or (element.get("Value") or [None])[0] not in (None, "", {})


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
