"""Small real Delta tables without Spark: rows of `instances` made from keywords, and their roll-ups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
from deltalake import DeltaTable, QueryBuilder, write_deltalake

from sphere.catalog.schema import BY_KEYWORD, TABLES, RollUp, Table, patient_key
from sphere.conf.loading import from_dict
from sphere.conf.settings import Settings
from sphere.ingest.storage import open_storage
from sphere.jobs.parquet import FileWriter
from sphere.jobs.tables import Tables

Row = dict[str, Any]
EPOCH = datetime(2024, 1, 1, tzinfo=timezone.utc)


def archive(folder: Path) -> Settings:
    """Settings of an archive in `folder`."""
    return from_dict({"archive": {"ae_title": "TESTED"}}, base=folder)


def instance(number: int, *, extra: Mapping[str, Any] | None = None, **attributes: Any) -> Row:
    """A row of `instances` from typed attributes; `extra` holds DICOM JSON elements that no column holds."""
    row: Row = {
        "SOPInstanceUID": f"1.2.{number}",
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2",
        "bundle": f"bundles/2024/01/01/{number // 4}.tar",
        "offset": 512 + number % 4 * 1024,
        "length": 1000,
        "dataset_offset": 132,
        "pixel_offset": None,
        "transfer_syntax_uid": "1.2.840.10008.1.2.1",
        "sha256": f"{number:064x}",
        "received_at": EPOCH + timedelta(seconds=number),
        "source_aet": "TEST",
        "origin": "import:test",
        **attributes,
    }
    row["dataset"] = orjson.dumps({**header(row), **(extra or {})}).decode()
    return row


def header(row: Mapping[str, Any]) -> dict[str, Any]:
    """The DICOM JSON object of a row's attributes (PS3.18 Annex F)."""
    elements = {}
    for keyword, value in row.items():
        column = BY_KEYWORD.get(keyword)
        if column is not None and value is not None:
            values = value if isinstance(value, list) else [value]
            vr = "US" if column.vr == "US or SS" else column.vr
            elements[f"{column.tag:08X}"] = {"vr": vr, "Value": [_json(one, vr) for one in values]}
    return dict(sorted(elements.items()))


def _json(value: Any, vr: str) -> Any:
    if vr == "PN":
        names = ("Alphabetic", "Ideographic", "Phonetic")
        return {name: group for name, group in zip(names, value.split("="), strict=False) if group}
    if isinstance(value, date):
        return f"{value:%Y%m%d}"
    return value


def write_catalog(
    settings: Settings, rows: Sequence[Row], *, files: int = 2, bundles: Sequence[Row] | None = None
) -> None:
    """All tables from nothing, in the order in which extraction commits them; `instances` in several files."""
    studies = [
        {**row, "patient_key": patient_key(row["PatientID"], row["IssuerOfPatientID"], row["StudyInstanceUID"])}
        for row in roll_up(TABLES["studies"].roll_up, rows)
    ]
    ordered = sorted(rows, key=lambda row: (row["StudyInstanceUID"], row["SOPInstanceUID"]))
    size = max(1, -(-len(ordered) // files))
    for start in range(0, len(ordered), size):
        write_table(
            settings, TABLES["instances"], ordered[start : start + size], "overwrite" if not start else "append"
        )
    write_table(settings, TABLES["series"], roll_up(TABLES["series"].roll_up, rows))
    write_table(settings, TABLES["studies"], studies)
    write_table(settings, TABLES["patients"], roll_up(TABLES["patients"].roll_up, studies))
    if bundles is None:
        names = sorted({row["bundle"] for row in rows})
        bundles = [{"bundle": bundle, "journal_bytes": 1, "members": 4} for bundle in names]
    write_table(settings, TABLES["bundles"], bundles)


def write_table(settings: Settings, table: Table, rows: Iterable[Row], mode: Any = "overwrite") -> None:
    """What is written to `instances` has only the columns that say something, as what extraction writes has."""
    data = pa.Table.from_pylist([dict(row) for row in rows], schema=table.schema)
    if table.name != "instances" or not len(data):
        write_deltalake(f"{settings.catalog_root}/{table.name}", data, mode=mode)
        return
    writer, tables = FileWriter(table), Tables(settings)
    for batch in data.to_batches():
        writer.add(batch)
    file = writer.finish(open_storage(settings.catalog_root), table.name)
    onto = tables.ensure(table.name) if mode == "append" else tables.open(table.name)
    removed: dict[str, int] = {}
    if onto is not None and mode == "overwrite":
        before = pa.table(onto.get_add_actions(flatten=True)).select(["path", "size_bytes"]).to_pylist()
        removed = {one["path"]: one["size_bytes"] for one in before}
    tables.append(table.name, [file], removed=removed, onto=onto)


def roll_up(spec: RollUp | None, rows: Sequence[Row]) -> list[Row]:
    """What `spec` says of some rows, computed plainly."""
    assert spec is not None
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: tuple(row[name] for name in spec.order)):
        groups.setdefault(tuple(row[name] for name in spec.keys), []).append(row)
    return [_rolled(spec, key, group) for key, group in groups.items()]


def _rolled(spec: RollUp, key: tuple[Any, ...], group: list[Row]) -> Row:
    row: Row = dict(zip(spec.keys, key, strict=True))
    for name in spec.attributes:
        row[name] = next((one[name] for one in group if one.get(name) is not None), None)
    for aggregate in spec.aggregates:
        values = [one[aggregate.source] for one in group if aggregate.source and one.get(aggregate.source) is not None]
        row[aggregate.column] = {
            "count": lambda values: len(group),
            "count_distinct": lambda values: len(set(values)),
            "collect_set": lambda values: sorted(set(values)),
            "union": lambda values: sorted({one for value in values for one in value}) or None,
            "sum": sum,
            "min": lambda values: min(values, default=None),
            "max": lambda values: max(values, default=None),
        }[aggregate.kind](values)
    return row


def table_positions(settings: Settings) -> list[Row]:
    """The rows of `bundles`."""
    found = (
        QueryBuilder().register("rows", DeltaTable(f"{settings.catalog_root}/bundles")).execute("SELECT * FROM rows")
    )
    return list(pa.table(found).to_pylist())
