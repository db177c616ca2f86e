"""Replacing rows of `instances`: the files that hold the old rows are copied without them, on the executors.

This is the copy-on-write of a MERGE by SOP Instance UID, confined to the files that it must touch. Rows are named by
their members' places, which tell two versions of an instance apart.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import DeltaTable
from pyspark.sql import SparkSession

from sphere.catalog.schema import TABLES
from sphere.conf.errors import CatalogError
from sphere.conf.settings import Settings
from sphere.ingest.storage import open_storage
from sphere.jobs.parquet import FileWriter, NewFile
from sphere.jobs.tables import Tables
from sphere.jobs.versions import Place

_TABLE = "instances"
_RESULT_DDL = "source string, matched bigint, path string, size bigint, modified_ms bigint, stats string"
_RESULT = pa.schema(
    [
        ("source", pa.string()),
        ("matched", pa.int64()),  # rows of the source at one of the places
        ("path", pa.string()),  # null: no row is left to be written
        ("size", pa.int64()),
        ("modified_ms", pa.int64()),
        ("stats", pa.string()),
    ]
)


def replace_rows(
    spark: SparkSession,
    settings: Settings,
    tables: Tables,
    *,
    old: Mapping[str, Place],
    new: Collection[Place] = (),
    staged: Iterable[str] = (),
) -> None:
    """Take the rows of the members `old`, by SOP Instance UID, out of `instances` and put those of `new` in, from the
    `staged` files.

    One commit. Raises JobFailed where the table was changed meanwhile, CatalogError where a row is not where it was.
    """
    table = tables.ensure(_TABLE)
    kept = _copy(spark, settings, _Copy(settings.catalog_root, settings.storage.user, frozenset(new), True), staged)
    left = _Copy(settings.catalog_root, settings.storage.user, frozenset(old.values()), False)
    candidates = _candidates(tables, table, old)
    cleaned = _copy(spark, settings, left, candidates)
    touched = [result for result in cleaned if result["matched"]]
    for results, places in ((kept, new), (touched, old)):
        if sum(result["matched"] for result in results) != len(places):
            raise CatalogError(f"{_TABLE}: {len(places)} rows were to be found, not all of them are there; rebuild it")
    files = [_file(result) for result in (*kept, *touched) if result["path"]]
    removed = {result["source"].removeprefix(f"{_TABLE}/"): candidates[result["source"]] for result in touched}
    tables.append(_TABLE, files, removed=removed, onto=table)


def _candidates(tables: Tables, table: DeltaTable, old: Mapping[str, Place]) -> dict[str, int]:
    """Files that may hold a row of one of these members, by its UID and the statistics of `bundle`, and their sizes."""
    if not old:
        return {}
    bundles = {bundle for bundle, _ in old.values()}
    holding = set(tables.holding(_TABLE, table, "SOPInstanceUID", pa.array(old, pa.string())))

    def may_hold(file: Mapping[str, Any]) -> bool:
        low, high = (file.get(f"{bound}.bundle") for bound in ("min", "max"))
        return file["path"] in holding and (low is None or high is None or any(low <= name <= high for name in bundles))

    files = pa.table(table.get_add_actions(flatten=True)).to_pylist()
    return {f"{_TABLE}/{file['path']}": file["size_bytes"] for file in files if may_hold(file)}


def _copy(spark: SparkSession, settings: Settings, task: _Copy, paths: Iterable[str]) -> list[dict[str, Any]]:
    one_each = [pa.table({"path": [path]}) for path in paths]
    if not one_each:
        return []
    frame = spark.createDataFrame(pa.concat_tables(one_each))  # one partition a file
    results: list[dict[str, Any]] = frame.mapInArrow(task, _RESULT_DDL).toArrow().to_pylist()
    return results


def _file(result: dict[str, Any]) -> NewFile:
    return NewFile(result["path"], result["size"], result["modified_ms"], result["stats"])


@dataclass(frozen=True)
class _Copy:
    """One Spark task: copy files, only the rows at the places or all but these."""

    catalog: str
    user: str
    places: frozenset[Place]
    matching: bool

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        storage = open_storage(self.catalog, user=self.user)
        for batch in batches:
            for source in batch["path"].to_pylist():
                file = pq.ParquetFile(pa.BufferReader(storage.read(source)))
                at = file.read(columns=["bundle", "offset"]).to_pylist()
                here = pa.array([(row["bundle"], row["offset"]) in self.places for row in at], pa.bool_())
                matched = here.true_count
                result = {"source": source, "matched": matched}
                if matched and (self.matching or matched < len(here)):
                    rows = file.read().filter(here if self.matching else pc.invert(here))
                    writer = FileWriter(TABLES[_TABLE])
                    for piece in rows.to_batches():
                        writer.add(piece)
                    result |= asdict(writer.finish(storage, _TABLE))
                yield pa.RecordBatch.from_pylist([result], schema=_RESULT)
