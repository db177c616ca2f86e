"""Mapped rows that are missing or damaged: answers stay right, and the rows are made anew by themselves."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from sphere.catalog import index as index_module
from sphere.catalog import index_build
from sphere.catalog.index_folder import IndexFolder
from sphere.catalog.query import Query
from sphere.catalog.rows import RowStore
from sphere.catalog.rows_note import NOTE, NotedFiles
from sphere.catalog.service import QueryService
from sphere.conf.errors import CatalogError
from sphere.conf.settings import Settings
from tests.bench import hospital, hospital_catalog
from tests.support.catalog import archive, write_catalog
from tests.support.makers import count, rows

pytestmark = pytest.mark.unit

LOOKS = 3
"""Questions after which a right answer is there, ROWS_LOOK_S apart."""
PATIENCE_S = 60.0

Made = tuple[Settings, hospital.Hospital]
Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return hospital_catalog.kept(tmp_path_factory.mktemp("damaged"), 120)


@pytest.fixture
def made(kept: Made, monkeypatch: pytest.MonkeyPatch) -> Iterator[Made]:
    monkeypatch.setattr(index_module, "REFRESH_WAIT_S", PATIENCE_S)
    with QueryService(kept[0]) as service:  # one that is whole
        wait(lambda: rows_of(service) is not None, service)
    yield kept


def folder(settings: Settings) -> Path:
    [found] = (settings.archive.state_dir / "index").glob("*.rows")
    return found


def inverted(path: Path) -> None:
    """Other bytes, as many, and from beyond the head, which would not be that of a file of its kind."""
    data = bytearray(path.read_bytes())
    first, last = (128, len(data)) if path.suffix == ".npy" else (len(data) // 4, len(data) * 3 // 4)
    for at in range(first, last):
        data[at] ^= 0xFF
    path.write_bytes(data)


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 8)


def one_bit(path: Path) -> None:
    """As a disk does, with the time of the file as it was."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-9] ^= 4
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def gone(path: Path) -> None:
    path.unlink()


def all_gone(path: Path) -> None:
    shutil.rmtree(path.parent)


def no_note(path: Path) -> None:
    (path.parent / NOTE).unlink()


def earlier_note(path: Path) -> None:
    """Sizes without checksums, as they were once."""
    note = path.parent / NOTE
    note.write_bytes(orjson.dumps({name: said[0] for name, said in orjson.loads(note.read_bytes()).items()}))


def short_note(path: Path) -> None:
    note = path.parent / NOTE
    said = orjson.loads(note.read_bytes())
    del said[path.name]
    note.write_bytes(orjson.dumps(said))


def a_file(path: Path) -> None:
    shutil.rmtree(path.parent)
    path.parent.write_bytes(b"no folder")


FILES = ("studies.StudyInstanceUID.hashes.npy", "studies.StudyInstanceUID.rows.npy", "studies.PatientID.hashes.npy",
         "studies.arrow", "studies.files.npy", "days.npy", "names.arrow")  # fmt: skip
WHOLE = (all_gone, no_note, earlier_note, short_note, a_file)


def asked(service: QueryService, some: hospital.Hospital) -> list[Any]:
    """Answers by each kind of key, with names; of instances as well."""
    uid, values = some.study_uid[3].as_py(), {name: column[3].as_py() for name, column in some.study_values.items()}
    family = values["PatientName"].partition("^")[0]
    queries = [
        Query.build("STUDY", match, return_keys=("PatientName", "PatientID"))
        for match in (
            {"StudyInstanceUID": uid}, {"PatientID": values["PatientID"]}, {"PatientName": f"{family}^*"},
            {"StudyDate": "20000101-20301231"}, {"AccessionNumber": values["AccessionNumber"]},
        )
    ]  # fmt: skip
    queries += [Query.build("SERIES", {"StudyInstanceUID": uid}), Query.build("IMAGE", {"StudyInstanceUID": uid})]
    return [[dict(match.columns) for match in service.find(query)] for query in queries]


def rows_of(service: QueryService) -> RowStore | None:
    return service._indexes.current().rows


def wait(until: Callable[[], bool], service: QueryService) -> None:
    end = time.monotonic() + PATIENCE_S
    while not until():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def right(made: Made) -> list[Any]:
    with QueryService(made[0]) as service:
        assert rows_of(service) is not None
        found = asked(service, made[1])
    assert all(found)
    return found


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [inverted, cut, one_bit, gone])
def test_before_opening(made: Made, right: list[Any], damage: Damage, name: str) -> None:
    """The first answer is right, the rows come back for the same process, and are whole for the next one."""
    path = folder(made[0]) / name
    damage(path)
    with QueryService(made[0]) as service:
        assert asked(service, made[1]) == right
        wait(lambda: rows_of(service) is not None, service)
        assert asked(service, made[1]) == right
    assert RowStore(path.parent.with_suffix(".duckdb")).are_whole()


@pytest.mark.parametrize("damage", WHOLE)
def test_the_folder_or_its_note(made: Made, right: list[Any], damage: Damage) -> None:
    damage(folder(made[0]) / FILES[0])
    with QueryService(made[0]) as service:
        assert asked(service, made[1]) == right
        wait(lambda: rows_of(service) is not None, service)
        assert asked(service, made[1]) == right


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [inverted, cut, one_bit, gone])
def test_while_serving(made: Made, right: list[Any], damage: Damage, name: str) -> None:
    """The look after the damage, at the latest, finds it: no question is put to what is mapped after that."""
    with QueryService(made[0]) as service, QueryService(made[0]) as other:
        assert asked(service, made[1]) == asked(other, made[1]) == right
        damage(folder(made[0]) / name)
        time.sleep(index_module.ROWS_LOOK_S)
        for _ in range(LOOKS):
            assert asked(service, made[1]) == asked(other, made[1]) == right
        for one in (service, other):
            wait(lambda one=one: rows_of(one) is not None, one)  # type: ignore[misc]
        assert asked(service, made[1]) == asked(other, made[1]) == right


@pytest.mark.parametrize("damage", WHOLE[:1])
def test_an_earlier_version_while_serving(made: Made, right: list[Any], damage: Damage) -> None:
    uid = made[1].study_uid[3].as_py()
    query = Query.build("STUDY", {"StudyInstanceUID": uid}, return_keys=("PatientName", "PatientID"))
    with QueryService(made[0]) as service:
        before = [dict(match.columns) for match in service.find(query, as_of=0)]
        for path in (made[0].archive.state_dir / "index").glob("*.rows"):
            damage(path / FILES[0])
        for _ in range(LOOKS):
            assert [dict(match.columns) for match in service.find(query, as_of=0)] == before


def test_between_two_looks_an_error_is_the_reason_to_look(
    made: Made, right: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row numbers that there are not: what was asked is answered all the same."""
    monkeypatch.setattr(index_module, "ROWS_LOOK_S", PATIENCE_S)
    with QueryService(made[0]) as service:
        assert asked(service, made[1]) == right
        inverted(folder(made[0]) / "studies.StudyInstanceUID.rows.npy")
        assert asked(service, made[1]) == right


def test_a_defect_of_ours_is_not_damage(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise IndexError("ours")

    with QueryService(made[0]) as service:
        before = rows_of(service)
        with monkeypatch.context() as patch:
            patch.setattr("sphere.catalog.service.look_up", fail)
            with pytest.raises(IndexError, match="ours"):
                asked(service, made[1])
        assert rows_of(service) is before is not None


def test_rows_that_cannot_be_made_are_tried_again(
    made: Made, right: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Path] = []

    def fail(self: IndexFolder, base: Path) -> None:
        tried.append(base)
        raise CatalogError("no room")

    monkeypatch.setattr(index_module, "ROWS_LOOK_S", 0.0)
    shutil.rmtree(folder(made[0]))
    with QueryService(made[0]) as service:
        with monkeypatch.context() as patch:
            patch.setattr(IndexFolder, "mend_rows", fail)
            assert asked(service, made[1]) == right
            wait(lambda: bool(tried) and service._indexes._mend_at < float("inf"), service)
            assert asked(service, made[1]) == right
            assert len(tried) == 1, "not with every question"
        service._indexes._mend_at = 0.0  # later
        wait(lambda: rows_of(service) is not None, service)


def test_by_who_serves_in_a_process_of_its_own(made: Made, right: list[Any]) -> None:
    inverted(folder(made[0]) / FILES[0])
    with QueryService(made[0], apart=True) as service:
        assert asked(service, made[1]) == right
        wait(lambda: rows_of(service) is not None, service)
        assert asked(service, made[1]) == right


def test_who_makes_refreshes_does_not_rely_on_them(made: Made) -> None:
    maker = IndexFolder(made[0], keep=True)
    base = folder(made[0]).with_suffix(".duckdb")
    with maker._attached.beside(base, None) as (_, found):
        assert found is not None
    inverted(folder(made[0]) / FILES[0])
    with maker._attached.beside(base, None) as (_, found):
        assert found is None
    maker.mend_rows(base)
    with maker._attached.beside(base, None) as (_, found):
        assert found is not None
    maker.close()


def test_bytes_that_change_without_a_trace_are_told_by_their_sums(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    (tmp_path / NOTE).write_bytes(orjson.dumps({"x": [3, 0x352441C2]}))  # CRC-32 of abc
    files = NotedFiles(tmp_path)
    assert files.are_whole() and not files.have_changed()
    (tmp_path / "x").write_bytes(b"abd")
    assert files.have_changed() and not files.are_whole()
    with pytest.raises(ValueError, match="x is damaged"):
        NotedFiles(tmp_path)


def test_index_files_deleted_while_serving(made: Made, right: list[Any]) -> None:
    """All of them: who has them open goes on, who comes makes them anew."""
    with QueryService(made[0]) as service:
        assert asked(service, made[1]) == right
        shutil.rmtree(made[0].archive.state_dir / "index")
        time.sleep(index_module.ROWS_LOOK_S)
        assert asked(service, made[1]) == right
        with QueryService(made[0]) as other:
            assert asked(other, made[1]) == right
        assert asked(service, made[1]) == right


@pytest.mark.parametrize("damaged", [False, True])
def test_what_goes_with_its_base_is_not_damaged(
    tmp_path: Path, damaged: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who makes a new base takes the one before away, which others still have open: that is no warning."""
    monkeypatch.setattr(index_module, "REFRESH_WAIT_S", PATIENCE_S)
    monkeypatch.setattr(index_build, "LEAST", 0)  # no refresh, a new base
    settings = archive(tmp_path)
    write_catalog(settings, rows(4))
    with QueryService(settings) as one, QueryService(settings) as other:
        wait(lambda: rows_of(one) is not None, one)
        if damaged:
            shutil.rmtree(folder(settings))
        else:
            write_catalog(settings, rows(5))
            assert count(other) == 5
        time.sleep(index_module.ROWS_LOOK_S)
        assert count(one) == (4 if damaged else 5)
    assert ("have changed" in caplog.text) == damaged
