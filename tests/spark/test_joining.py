"""Short batches one after another: few files of `instances` are left, and who follows the table sees the batches."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, get_args
from urllib.parse import unquote, urlsplit

import orjson
import pytest
from deltalake import DeltaTable
from pyspark.sql import SparkSession

from sphere.catalog.index_note import note_of
from sphere.catalog.query import Query
from sphere.catalog.schema import TABLES, Level
from sphere.catalog.service import QueryService
from sphere.conf.settings import Settings
from sphere.ingest.header import identify
from sphere.jobs import forward_queue, joining
from sphere.jobs.extract import run
from tests.support.landing import all_tables, archive, changed, copy_of, land, new_member, slices

pytestmark = pytest.mark.spark

BATCHES = 6
ENOUGH = 3
KEYS = ("PatientName", "PatientID", "NumberOfPatientRelatedInstances")


def answers(settings: Settings, as_of: int | None = None) -> list[Any]:
    """What is found at every level."""
    with QueryService(settings) as service:
        asked = [Query.build(level, {}, return_keys=KEYS) for level in get_args(Level)]
        found = [[str(one.identifier()) for one in service.find(query, as_of=as_of)] for query in asked]
    return list(map(sorted, found))


def test_files_are_few_and_nobody_sees_rows_that_move(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one large batch would have left the tables, and to who asks as of a batch what there was then."""
    monkeypatch.setattr(joining, "SIZES", ((1 << 20, ENOUGH),))
    settings = archive(tmp_path / "an archive", ingest={"on_conflict": "replace"})
    batches = [slices(2, seed=number, study=number % 4) for number in range(BATCHES)]
    batches[5] = [changed(batches[1][0], SeriesDescription="sent again")]
    seen: dict[int, list[Any]] = {}
    bases: set[str] = set()
    version, joined = -1, 0
    for number, batch in enumerate(batches):
        land(settings, [new_member(data, second=number) for data in batch])
        assert run(spark, settings).rows == len(batch)
        table = DeltaTable(f"{settings.catalog_root}/instances")
        assert len(table.file_uris()) <= ENOUGH + 1
        came = [row["SOPInstanceUID"] for row in forward_queue._came(table, version)]
        assert sorted(came) == sorted(identify(data, size=len(data)).SOPInstanceUID for data in batch)
        joined += any(moves(settings, at) for at in range(version + 1, table.version() + 1))
        version = table.version()
        seen[DeltaTable(f"{settings.catalog_root}/bundles").version()] = answers(settings)
        indexes = (settings.archive.state_dir / "index").glob("*.duckdb")
        bases.update(index.name for index in indexes if not note_of(index).base)
    assert joined >= 2
    assert len(bases) == 1, "indexes were only refreshed"
    assert [answers(settings, version) for version in seen] == list(seen.values())
    at_once = copy_of(settings, tmp_path / "at once", ingest={"on_conflict": "replace"})
    shutil.rmtree(tmp_path / "at once" / "storage" / "catalog")
    shutil.rmtree(at_once.archive.state_dir)
    run(spark, at_once)
    assert answers(at_once) == answers(settings)
    expected, found = all_tables(at_once), all_tables(settings)
    for name in TABLES.keys() - {"bundles"}:
        assert found[name] == expected[name], name


def moves(settings: Settings, version: int) -> bool:
    """Whether rows only moved, some of them, in a commit to `instances`."""
    url = urlsplit(f"{settings.catalog_root}/instances/_delta_log/{version:020}.json")
    actions = [orjson.loads(line) for line in Path(unquote(url.path)).read_bytes().splitlines()]
    return any(not one[kind]["dataChange"] for one in actions for kind in ("add", "remove") if kind in one)
