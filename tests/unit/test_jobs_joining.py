"""Small files of `instances` become longer ones, and nothing else does."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sphere.catalog.schema import TABLES
from sphere.ingest.storage import open_storage
from sphere.jobs import joining
from sphere.jobs.joining import FULL, NOTHING, SIZES, due, join
from sphere.jobs.parquet import FileWriter
from tests.support.catalog import instance

pytestmark = pytest.mark.unit

KIB = 1 << 10


def test_files_wait_until_there_are_enough_of_about_one_size() -> None:
    sizes = {f"{number:02}": 10 * KIB + number for number in range(15)}
    assert due(sizes) == due(sizes | {"other": 100 * KIB, "long": 4096 * KIB}) == []
    assert due(sizes | {"15": KIB, "other": 100 * KIB}) == ["15", *sorted(sizes)]
    assert due({f"{number}": 300 * KIB for number in range(8)}) == [f"{number}" for number in range(8)]
    assert len(due({f"{number}": 1000 * KIB for number in range(100)})) == FULL // (1000 * KIB)


@pytest.mark.parametrize("rows", [1, 30, 200, 1000])
@pytest.mark.parametrize(("head", "each"), [(8 * KIB, 60), (39 * KIB, 250)])
def test_what_is_written_anew_and_what_is_left_whatever_the_number_of_batches(rows: int, head: int, each: int) -> None:
    """In numbers only: bytes of a file, and of each row in it; small files are few, the others long."""
    sizes: dict[str, int] = {}
    came = anew = 0
    for batch in range(5000):
        sizes[f"{batch}"] = head + each * rows
        came += head + each * rows
        if found := due(sizes):
            anew += sum(sizes[path] for path in found)
            sizes[f"joined {batch}"] = head + sum(sizes.pop(path) - head for path in found)
        assert sum(size < SIZES[-1][0] for size in sizes.values()) <= sum(enough for _, enough in SIZES)
    assert anew <= 2 * came
    assert len(sizes) <= 32 + 5000 * each * rows // SIZES[-1][0]


def written(folder: Path, groups: list[list[dict[str, Any]]]) -> dict[str, int]:
    storage = open_storage(folder.as_uri())
    sizes = {}
    for rows in groups:
        writer = FileWriter(TABLES["instances"])
        writer.add(pa.RecordBatch.from_pylist(rows, TABLES["instances"].schema))
        file = writer.finish(storage, "instances")
        sizes[file.path] = file.size
    return sizes


def test_rows_are_those_of_before_in_the_order_of_studies(tmp_path: Path) -> None:
    numbers = list(range(64))
    random.Random(1).shuffle(numbers)
    of = [
        instance(number, StudyInstanceUID=f"1.{number // 8}", **({"Rows": 512} if number % 2 else {"EchoTime": 1.5}))
        for number in numbers
    ]
    sizes = written(tmp_path, [of[at : at + 4] for at in range(0, 64, 4)])
    joined = join(open_storage(tmp_path.as_uri()), sizes)
    assert joined.removed == sizes
    [file] = joined.files
    found = pq.read_table(tmp_path / "instances" / file.path)
    keys = list(zip(*(found[name].to_pylist() for name in joining._ORDER), strict=True))
    assert keys == sorted(keys)
    known = {one["SOPInstanceUID"]: one for one in of}
    for row in found.to_pylist():
        before = known.pop(row["SOPInstanceUID"])
        assert {name: value for name, value in row.items() if value is not None} == {
            name: value for name, value in before.items() if value is not None
        }
    assert not known
    assert file.size == (tmp_path / "instances" / file.path).stat().st_size


def test_what_somebody_else_added_stays(tmp_path: Path) -> None:
    """A file with a column that is not ours is left as it is."""
    sizes = written(tmp_path, [[instance(number)] for number in range(SIZES[0][1])])
    theirs = next(iter(sizes))
    path = tmp_path / "instances" / theirs
    pq.write_table(pq.read_table(path).append_column("score", pa.array([0.5])), path)
    assert join(open_storage(tmp_path.as_uri()), sizes).removed.keys() == sizes.keys() - {theirs}


def test_memory_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = written(tmp_path, [[instance(number * 3 + at) for at in range(3)] for number in range(SIZES[0][1])])
    monkeypatch.setattr(joining, "ROWS", 10)
    assert len(join(open_storage(tmp_path.as_uri()), sizes).removed) == 3
    monkeypatch.setattr(joining, "ROWS", 5)
    assert join(open_storage(tmp_path.as_uri()), sizes) is NOTHING
