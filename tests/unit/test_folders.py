"""Folders of days that are over are not listed again, and nothing that comes to them is missed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sphere.catalog.tail import JournalTail
from sphere.ingest import folders
from sphere.ingest.folders import SealedFolders
from sphere.ingest.journal import Landed, Sealed, to_lines
from sphere.ingest.recovery import recover
from sphere.ingest.storage import local
from sphere.ingest.storage.local import LocalStorage
from tests.support.landing import archive

pytestmark = pytest.mark.unit

DAYS, PER_DAY, MONTHS = 40, 3, 2
ABOVE = 2 + MONTHS  # folders above those of the days
Listed = list[str]


def put(storage: LocalStorage, day: int, number: int, *, sealed: bool = True) -> str:
    """A bundle of a day long ago, with a journal that says no more than that."""
    path = f"bundles/2024/{1 + day // 28:02}/{1 + day % 28:02}/{day}-{number}.tar"
    storage.write(path, b"x" * 2048)
    storage.write(path.replace(".tar", ".journal"), to_lines([], Sealed(0, 2048)) if sealed else b"")
    for file in (path, path.replace(".tar", ".journal")):
        os.utime(storage.root / file, (1.7e9, 1.7e9))
    os.utime((storage.root / path).parent, (1.7e9 + number, 1.7e9 + number))
    return path


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "storage")


@pytest.fixture
def bundles(storage: LocalStorage) -> set[str]:
    return {put(storage, day, number) for day in range(DAYS) for number in range(PER_DAY)}


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listed]:
    """Folders that were listed."""
    real, names = os.scandir, []

    def scandir(path: Path) -> Iterator[os.DirEntry[str]]:
        names.append(str(path))
        return real(path)

    monkeypatch.setattr(local.os, "scandir", scandir)
    return names


def see(storage: LocalStorage, state: Path, sealed: set[str]) -> list[str]:
    seen = SealedFolders(storage, state)
    return [one.bundle for one in Landed(storage, folders=seen).bundles(skip=sealed)]


def test_days_are_listed_once(storage: LocalStorage, bundles: set[str], listed: Listed, tmp_path: Path) -> None:
    assert see(storage, tmp_path, bundles) == []
    assert len(listed) == ABOVE + DAYS
    listed.clear()
    assert see(storage, tmp_path, bundles) == []
    assert len(listed) == ABOVE
    new = put(storage, 7, PER_DAY)
    listed.clear()
    assert see(storage, tmp_path, bundles) == [new]
    assert len(listed) == ABOVE + 1


def test_what_a_catalog_does_not_have_is_listed(
    storage: LocalStorage, bundles: set[str], listed: Listed, tmp_path: Path
) -> None:
    see(storage, tmp_path, bundles)
    lost = sorted(bundles)[5]
    listed.clear()
    assert see(storage, tmp_path, bundles - {lost}) == [lost]
    assert len(listed) == ABOVE + 1
    assert see(storage, tmp_path, set()) == sorted(bundles), "a catalog that begins again"


def test_a_day_with_an_open_bundle_or_of_just_now_is_listed_again(
    storage: LocalStorage, bundles: set[str], listed: Listed, tmp_path: Path
) -> None:
    still_open = put(storage, 3, 9, sealed=False)
    now = time.time()
    os.utime((storage.root / put(storage, 4, 9)).parent, (now, now))
    sealed = bundles | {"bundles/2024/01/05/4-9.tar"}
    see(storage, tmp_path, sealed)
    listed.clear()
    assert see(storage, tmp_path, sealed) == [still_open]
    assert len(listed) == ABOVE + 2


def test_what_is_known_is_taken_apart_once(
    storage: LocalStorage, bundles: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And again when another process has written it since."""
    real, read = folders._parsed, []
    monkeypatch.setattr(folders, "_parsed", lambda data: read.append(1) or real(data))
    for _ in range(4):
        assert see(storage, tmp_path, bundles) == []
    assert len(read) == 1
    other = tmp_path / "other"
    new = put(storage, 7, PER_DAY)
    assert see(storage, other, bundles | {new}) == []
    [theirs], [ours] = other.glob("folders-*.json"), tmp_path.glob("folders-*.json")
    theirs.replace(ours)
    for _ in range(2):
        assert see(storage, tmp_path, bundles | {new}) == []
    assert len(read) == 2


@pytest.mark.parametrize("damage", [b"", b"{", b'{"days":{"a":1}}', b'{"days":[]}', b"[]"])
def test_damage_costs_a_listing_only(storage: LocalStorage, bundles: set[str], tmp_path: Path, damage: bytes) -> None:
    see(storage, tmp_path, bundles)
    [kept] = tmp_path.glob("folders-*.json")
    kept.write_bytes(damage)
    new = put(storage, 7, PER_DAY)
    assert see(storage, tmp_path, bundles) == [new]


def test_recovery_looks_at_what_may_be_unsealed(
    tmp_path: Path, listed: Listed, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = archive(tmp_path)
    storage = LocalStorage(Path(settings.storage.root.removeprefix("file://")))
    for day in range(DAYS):
        put(storage, day, 0)
    read: list[str] = []
    real = LocalStorage.read
    monkeypatch.setattr(LocalStorage, "read", lambda self, path, *a: (read.append(path), real(self, path, *a))[1])
    assert recover(storage, settings).bundles == ()
    assert (len(listed), len(read)) == (ABOVE + DAYS, DAYS)
    listed.clear()
    read.clear()
    assert recover(storage, settings).bundles == ()
    assert (len(listed), len(read)) == (ABOVE, 0)
    empty = put(storage, 5, 1, sealed=False)
    (storage.root / empty).write_bytes(b"")
    os.utime(storage.root / empty, (1.7e9, 1.7e9))
    assert [one.bundle for one in recover(storage, settings).bundles] == [empty]


def test_a_new_index_does_not_list_what_is_settled(
    storage: LocalStorage, bundles: set[str], listed: Listed, tmp_path: Path
) -> None:
    see(storage, tmp_path, bundles)
    listed.clear()
    tail = JournalTail(storage, tmp_path, {}, bundles)
    assert tail.take(10) == []
    assert len(listed) == ABOVE
