"""Every typed value of real headers finds its own instance, by its column and by its header."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Any

import duckdb
import orjson
import pyarrow as pa
import pytest

from sphere.catalog.match_header import holds
from sphere.catalog.plan import column_sql
from sphere.catalog.predicate import Node, compile_sql
from sphere.catalog.query import Query
from sphere.catalog.schema import TABLES
from sphere.conf.errors import QueryError
from sphere.ingest.header import Header, RowBuilder
from sphere.ingest.records import MemberRecord
from tests.support.headers import packaged_files, read

pytestmark = pytest.mark.unit

RECORD = MemberRecord(
    bundle="b",
    offset=0,
    length=1,
    dataset_offset=0,
    SOPInstanceUID="",
    SOPClassUID="",
    StudyInstanceUID="",
    SeriesInstanceUID="",
    TransferSyntaxUID="",
    sha256="",
    received_at=datetime(2024, 1, 1, tzinfo=timezone.utc),
    source_aet="",
    origin="",
)


def texts(value: Any) -> Iterator[str]:
    """A typed value as a person would type it, each of several."""
    for one in value if isinstance(value, list) else [value]:
        if one is not None:
            yield f"{one:%Y%m%d}" if isinstance(one, date) else str(one)


def nodes_of(header: Header) -> list[Node]:
    """What asks for each value; values that no identifier can hold are left out."""
    nodes: list[Node] = []
    for keyword, value in header.values.items():
        for text in texts(value):
            try:
                nodes += Query.build("IMAGE", {keyword: text}).predicate()
            except QueryError:
                continue
    return nodes


def check(paths: list[Path]) -> int:
    """How many values were asked for, after none of them was missed."""
    builder, asked = RowBuilder(TABLES["instances"].schema), []
    for path in paths:
        header = read(path.read_bytes())
        if isinstance(header, Header):
            builder.append(header, RECORD)
            asked.append((path.name, header, nodes_of(header)))
    missed = []
    with duckdb.connect() as database:
        table = pa.Table.from_batches([builder.batch()])
        for number, (name, header, nodes) in enumerate(asked):
            said = [keyword for keyword in table.column_names if keyword in header.values]
            database.register("i", table.slice(number, 1).select(said))
            dataset = orjson.loads(header.dataset)
            missed += [f"{name} header {node}" for node in nodes if not holds((node,), dataset)]
            compiled = compile_sql(nodes, lambda keyword: column_sql("i", keyword))
            conditions = ", ".join(compiled.conditions)
            [answers] = database.execute(f"SELECT {conditions} FROM i", list(compiled.values)).fetchall()
            missed += [f"{name} sql {node}" for node, answer in zip(nodes, answers, strict=True) if answer is not True]
    assert missed == []
    return sum(len(nodes) for _, _, nodes in asked)


def test_packaged_files() -> None:
    assert check(packaged_files()) > 1000


def test_corpus(corpus: Path, corpus_index: list[dict[str, str]]) -> None:
    assert check([corpus / row["file"] for row in corpus_index]) > 5000
