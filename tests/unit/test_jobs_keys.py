"""Which files hold which keys: nothing is ever missed, and few files are opened."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from deltalake import write_deltalake

from sphere.catalog.schema import TABLES
from sphere.conf.settings import Settings
from sphere.ingest.storage.local import LocalStorage
from sphere.jobs.keys import KeyFiles, _hashes, _places
from sphere.jobs.plan import known_instances
from sphere.jobs.tables import Tables
from tests.support.catalog import instance
from tests.support.landing import archive

pytestmark = pytest.mark.unit

Files = dict[str, list[str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def holding(keys: KeyFiles, files: Files, *values: str, table: str = "t", read: list[str] | None = None) -> list[str]:
    def load(path: str) -> pa.Table:
        if read is not None:
            read.append(path)
        return pa.table({"uid": pa.array(files[path], pa.string()), "other": pa.array(["1.2"] * len(files[path]))})

    return keys.holding(table, files, "uid", pa.array(values, pa.string()), load=load)


def test_every_key_is_found_whatever_comes_and_goes(folder: Path) -> None:
    chance = random.Random(3)
    files: Files = {}
    for step in range(60):
        uids = [f"1.2.{chance.randrange(400)}" for _ in range(chance.randrange(1, 30))]
        files[f"{step}.parquet"] = uids
        for gone in chance.sample(sorted(files), k=min(len(files) - 1, chance.randrange(2))):
            del files[gone]
        wanted = [f"1.2.{chance.randrange(400)}" for _ in range(10)]
        found = holding(KeyFiles(folder, ("uid", "other")), files, *wanted)
        assert found == [path for path, uids in files.items() if set(uids) & set(wanted)]
    assert len(list(folder.glob("*.run"))) <= 8


def test_a_file_is_read_once(folder: Path) -> None:
    files = {f"{number}": [f"1.{number}"] for number in range(5)}
    read: list[str] = []
    assert holding(KeyFiles(folder, ("uid", "other")), files, "1.3", read=read) == ["3"]
    assert sorted(read) == sorted(files)
    read.clear()
    more = {**files, "9": ["1.9", "1.3"]}
    assert holding(KeyFiles(folder, ("uid", "other")), more, "1.3", read=read) == ["3", "9"]
    assert read == ["9"]


def test_columns_are_kept_apart(folder: Path) -> None:
    keys = KeyFiles(folder, ("uid", "other"))
    assert holding(keys, {"a": ["1.1"], "b": ["1.2"]}, "1.2") == ["b"]  # every row's "other" is 1.2


def test_values_longer_than_a_uid_and_empty_ones(folder: Path) -> None:
    long = "9" * 200
    files = {"a": [long], "b": ["", "1.2"], "c": [long[:64]], "d": ["é" * 40]}
    keys = KeyFiles(folder, ("uid", "other"))
    assert holding(keys, files, long) == ["a"]
    assert holding(keys, files, "") == ["b"]
    assert holding(keys, files, "é" * 40, long[:64]) == ["c", "d"]
    assert holding(keys, files, "1.3") == []
    assert holding(keys, {}, "1.2") == []


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [_cut, _flip, Path.unlink])
@pytest.mark.parametrize("what", ["files.json", "*.run"])
def test_a_damaged_cache_is_made_anew(
    folder: Path, harm: Callable[[Path], None], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"{number}": [f"1.{number}.{at}" for at in range(50)] for number in range(3)}
    holding(KeyFiles(folder, ("uid", "other")), files, "1.1.7")
    monkeypatch.setattr("sphere.jobs.keys._checked", set())  # as another process
    for path in folder.glob(what):
        harm(path)
    read: list[str] = []
    assert holding(KeyFiles(folder, ("uid", "other")), files, "1.1.7", "1.2.0", read=read) == ["1", "2"]
    assert len(read) == 3
    assert {path.suffix for path in folder.iterdir()} == {".json", ".run"}


def test_another_table_at_the_same_place_is_read_anew(folder: Path) -> None:
    assert holding(KeyFiles(folder, ("uid", "other")), {"a": ["1.1"]}, "1.1") == ["a"]
    assert holding(KeyFiles(folder, ("uid", "other")), {"a": ["1.2"]}, "1.2", table="u") == ["a"]


def test_places_among_many_hashes_are_those_of_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of hashes that are spread evenly, as ours are, and of others; of what is there, beside it and beyond it."""
    monkeypatch.setattr("sphere.jobs.keys._MANY", 2)
    chance = np.random.default_rng(3)
    ends = np.array([0, np.iinfo(np.uint64).max], np.uint64)
    even = chance.integers(*ends, 5000, np.uint64, endpoint=True)
    for hashes in (
        even, even[:2], np.repeat(even[:100], 50), even >> np.uint64(30), even | np.uint64(1 << 63), even * 0,
        np.repeat(ends[1:], 300), np.concatenate([even, ends, ends]),
    ):  # fmt: skip
        found = np.sort(hashes)
        wanted = np.sort(np.concatenate([found, found + np.uint64(1), found - np.uint64(1), even[::7], ends]))
        assert np.array_equal(_places(found, wanted), np.searchsorted(found, wanted, "left"))


def test_few_places_are_searched_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As hashes of UIDs are spread evenly, nearly every place is where it was guessed to be."""
    monkeypatch.setattr("sphere.jobs.keys._MANY", 2)
    uids = pa.array([f"1.2.840.113619.2.55.3.{number // 500}.{number}" for number in range(300_000)])
    hashes = np.sort(_hashes(uids, 0))
    wanted = np.sort(_hashes(pa.array([f"1.2.840.113619.2.56.{number}" for number in range(2_000)]), 0))
    searched: list[int] = []
    search = np.searchsorted
    monkeypatch.setattr(np, "searchsorted", lambda *args: (searched.append(len(args[1])), search(*args))[1])
    assert np.array_equal(_places(hashes, wanted), search(hashes, wanted))
    assert sum(searched) < 60


def test_a_file_that_cannot_be_read_is_asked_for_again(folder: Path) -> None:
    keys = KeyFiles(folder, ("uid", "other"))
    with pytest.raises(KeyError):
        keys.holding("t", ["a"], "uid", pa.array(["1"]), load=lambda path: pa.table({})[path])
    assert holding(keys, {"a": ["1.1"]}, "1.1") == ["a"]


def written(settings: Settings, files: int, rows: int) -> None:
    tables = Tables(settings)
    for file in range(files):
        numbers = range(file * rows, (file + 1) * rows)
        found = [instance(n, StudyInstanceUID=f"1.9.{n // 10}", SeriesInstanceUID=f"1.9.{n // 10}.1") for n in numbers]
        table = pa.Table.from_pylist(found, schema=TABLES["instances"].schema)
        write_deltalake(tables.ensure("instances"), table, mode="append")


def test_known_instances_open_only_files_that_hold_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many files there are: none for new instances, one for those of one file, and none is read twice."""
    settings = archive(tmp_path / "an archive")
    written(settings, files=12, rows=10)
    opened: list[str] = []
    real = LocalStorage.read
    monkeypatch.setattr(
        LocalStorage, "read", lambda self, path, *args: (opened.append(path), real(self, path, *args))[1]
    )

    def known(*uids: str) -> tuple[set[str], int]:
        opened.clear()
        tables = Tables(settings)
        found = known_instances(tables, tables.open("instances"), uids)
        return set(found), len({path for path in opened if path.endswith(".parquet")})

    assert known("1.2.7") == ({"1.2.7"}, 12)  # what no run has seen is read once
    assert known("1.2.1000", "") == (set(), 0)
    assert known("1.2.7", "1.2.9", "1.2.1000") == ({"1.2.7", "1.2.9"}, 1)
    assert known(*(f"1.2.{number}" for number in range(0, 120, 10))) == ({f"1.2.{n}" for n in range(0, 120, 10)}, 12)
