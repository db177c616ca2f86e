"""Commits to the log of a table, as delta-rs reads them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pytest
from deltalake import DeltaTable

from sphere.catalog.schema import TABLES
from sphere.conf.errors import StorageError
from sphere.ingest.storage import open_storage
from sphere.ingest.storage.local import LocalStorage
from sphere.jobs.commits import CHECKPOINTS, Overtaken, commit, is_plain
from sphere.jobs.lookup import files
from sphere.jobs.parquet import FileWriter, NewFile
from sphere.jobs.tables import Tables
from tests.support.landing import archive

pytestmark = pytest.mark.unit

DAY_S = 24 * 3600
FIRST, SECOND = (NewFile(f"part-{name}.zstd.parquet", 7, 1000, '{"numRecords":1}') for name in ("a", "b"))


def log_of(folder: Path, version: int) -> dict[str, Any]:
    lines = (folder / "_delta_log" / f"{version:020}.json").read_bytes().splitlines()
    return {name: action for line in lines for name, action in orjson.loads(line).items()}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_made_as_delta_rs_makes_it(tmp_path: Path, name: str) -> None:
    properties = {"delta.dataSkippingNumIndexedCols": "32", **TABLES[name].properties}
    commit(open_storage(tmp_path.as_uri()), name, 0, [FIRST], {}, mark=("app", 3), properties=properties)
    DeltaTable.create((tmp_path / "theirs").as_uri(), TABLES[name].schema, configuration=properties)
    ours, theirs = log_of(tmp_path / name, 0), log_of(tmp_path / "theirs", 0)
    own = {"id": "", "createdTime": 0}
    assert ours["protocol"] == theirs["protocol"]
    assert ours["metaData"] | own == theirs["metaData"] | own
    table = DeltaTable((tmp_path / name).as_uri())
    assert (table.version(), files(table), table.transaction_version("app")) == (0, {FIRST.path: 7}, 3)
    assert table.history()[0]["operation"] == "CREATE TABLE"


def test_files_come_and_go(tmp_path: Path) -> None:
    storage = open_storage(tmp_path.as_uri())
    schema = TABLES["instances"].schema
    written = []
    for uid in ("1.2", "1.3"):
        writer = FileWriter(TABLES["instances"])
        writer.add(pa.RecordBatch.from_pylist([{"SOPInstanceUID": uid}], schema))
        written.append(writer.finish(storage, "instances"))
    commit(storage, "instances", 0, written[:1], {}, properties=TABLES["instances"].properties)
    commit(storage, "instances", 1, written[1:], {written[0].path: written[0].size}, mark=("app", 1))
    table = DeltaTable((tmp_path / "instances").as_uri())
    assert (table.version(), files(table)) == (1, {written[1].path: written[1].size})
    feed = pa.table(
        table.load_cdf(starting_version=0, columns=['"SOPInstanceUID"', "_change_type", "_commit_version"])
    ).to_pylist()
    changes = sorted((row["SOPInstanceUID"], row["_change_type"], row["_commit_version"]) for row in feed)
    assert changes == [("1.2", "delete", 1), ("1.2", "insert", 0), ("1.3", "insert", 1)]
    assert [one["operation"] for one in table.history()] == ["WRITE", "CREATE TABLE"]


def test_a_version_is_written_once(tmp_path: Path) -> None:
    storage = open_storage(tmp_path.as_uri())
    commit(storage, "bundles", 0, [FIRST], {}, properties={})
    for version in (0, 1):
        if version:
            commit(storage, "bundles", 1, [], {})
        before = log_of(tmp_path / "bundles", version)
        with pytest.raises(Overtaken):
            commit(storage, "bundles", version, [SECOND], {}, properties={})
        assert log_of(tmp_path / "bundles", version) == before
    assert sorted(path.name[-7:] for path in (tmp_path / "bundles" / "_delta_log").iterdir()) == ["00.json", "01.json"]


@pytest.mark.parametrize("done", [True, False])
def test_the_answer_to_a_commit_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: bool) -> None:
    """What was asked again on HDFS is refused as it is there; what is not there is no commit."""
    rename = LocalStorage.rename

    def lost(self: LocalStorage, path: str, to: str) -> None:
        if done:
            rename(self, path, to)
        raise StorageError("no answer")

    monkeypatch.setattr(LocalStorage, "rename", lost)
    storage = open_storage(tmp_path.as_uri())
    if done:
        commit(storage, "bundles", 0, [FIRST], {}, properties={})
    else:
        with pytest.raises(StorageError, match="no answer"):
            commit(storage, "bundles", 0, [FIRST], {}, properties={})
    assert len(list((tmp_path / "bundles" / "_delta_log").iterdir())) == done


def test_checkpoints_are_made_by_delta_rs(tmp_path: Path) -> None:
    settings = archive(tmp_path)
    tables = Tables(settings)
    for _ in range(CHECKPOINTS + 1):
        tables.append("bundles", [], onto=tables.open("bundles"))
    log = Path(tables.url("bundles").removeprefix("file://")) / "_delta_log"
    assert orjson.loads((log / "_last_checkpoint").read_bytes())["version"] == CHECKPOINTS - 1
    assert Tables(settings).ensure("bundles").version() == CHECKPOINTS
    assert [one["engineInfo"] for one in DeltaTable(tables.url("bundles")).history(3)][1:2] != ["sphere"]


@pytest.mark.parametrize("earlier", [False, True], ids=["new", "of an earlier version"])
def test_versions_stay_however_old_they_are(tmp_path: Path, earlier: bool) -> None:
    """Forty days later, with a checkpoint: by default the log before it would go (delta.logRetentionDuration)."""
    settings = archive(tmp_path)
    if earlier:
        DeltaTable.create(Tables(settings).url("bundles"), TABLES["bundles"].schema)
    log = Path(Tables(settings).url("bundles").removeprefix("file://")) / "_delta_log"
    for _ in range(2):
        tables = Tables(settings)
        tables.ensure("bundles")
        for _ in range(CHECKPOINTS + 1):
            tables.append("bundles", [], onto=tables.open("bundles"))
        for path in log.iterdir():
            os.utime(path, times=(time.time() - 40 * DAY_S,) * 2)
    assert orjson.loads((log / "_last_checkpoint").read_bytes())["version"] == 2 * CHECKPOINTS - 1
    assert [DeltaTable(tables.url("bundles"), version=at).version() for at in (0, 1, 50, 150)] == [0, 1, 50, 150]


def test_a_hospital_may_have_its_log_cleaned(tmp_path: Path) -> None:
    settings = archive(tmp_path)
    asked = {"delta.enableExpiredLogCleanup": "true"}
    DeltaTable.create(Tables(settings).url("bundles"), TABLES["bundles"].schema, configuration=asked)
    assert Tables(settings).ensure("bundles").metadata().configuration == asked


def test_what_asks_for_more_is_left_to_delta_rs(tmp_path: Path) -> None:
    for name, properties in {"plain": {}, "newer": {"delta.enableDeletionVectors": "true"}}.items():
        DeltaTable.create((tmp_path / name).as_uri(), TABLES["bundles"].schema, configuration=properties)
    plain, newer = (DeltaTable((tmp_path / name).as_uri()) for name in ("plain", "newer"))
    assert is_plain(plain, ["part-1.parquet", "day=1/part-2.parquet"])
    assert not is_plain(plain, ["part%201.parquet"])
    assert not is_plain(newer, [])
