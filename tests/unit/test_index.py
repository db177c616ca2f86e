"""The index: one file per catalog version, made by whoever comes first, replaced without waiting."""

from __future__ import annotations

import fcntl
import gc
import multiprocessing
import pickle
import shutil
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import duckdb
import psutil
import pytest

from sphere.catalog import index as index_module
from sphere.catalog.index import IndexCache
from sphere.catalog.index_folder import IndexFolder
from sphere.catalog.index_process import IndexProcess
from sphere.catalog.query import Query
from sphere.catalog.service import QueryService
from sphere.catalog.tables import CatalogTables
from sphere.conf.errors import CatalogError
from sphere.conf.settings import Settings
from tests.support.catalog import Row, archive, instance, write_catalog
from tests.support.receiver import ROOT

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers come from the newest version, however long that takes on a loaded machine."""
    monkeypatch.setattr(index_module, "REFRESH_WAIT_S", 60.0)


def rows(studies: int, *, per_study: int = 2) -> list[Row]:
    return [
        instance(
            study * 100 + number,
            StudyInstanceUID=f"9.{study}",
            SeriesInstanceUID=f"9.{study}.1",
            PatientID=f"P{study}",
            IssuerOfPatientID=None,
            Modality="CT",
            StudyDescription=" padded ",
        )
        for study in range(studies)
        for number in range(per_study)
    ]


@pytest.fixture(autouse=True)
def _a_build_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is; the test of a long build sets its own."""
    monkeypatch.setattr(index_module, "REFRESH_WAIT_S", 60.0)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    settings = archive(tmp_path)
    write_catalog(settings, rows(4), files=4)
    return settings


def files(settings: Settings) -> list[Path]:
    return sorted((settings.archive.state_dir / "index").glob("*.duckdb"))


def count(service: QueryService) -> int:
    return service.count(Query.build("STUDY"))


def test_columns_that_say_nothing(tmp_path: Path) -> None:
    """They are in the base with the types of an empty one; a list without entries stays one."""
    described = []
    for name, some in (("none", []), ("some", [row | {"OperatorsName": []} for row in rows(3)])):
        settings = archive(tmp_path / name)
        write_catalog(settings, some)
        path = IndexFolder(settings).make()
        with duckdb.connect(str(path), read_only=True) as db:
            for table in ("patients", "studies", "series"):
                columns = db.execute(f"SELECT column_name, column_type FROM (DESCRIBE {table})").fetchall()
                assert [column for column, _ in columns if not column.endswith("$name")] != []
                described.append((name, table, sorted(columns)))
            said = db.execute("SELECT SeriesInstanceUID, OperatorsName, ProtocolName FROM series").fetchall()
    assert [columns for name, _, columns in described if name == "none"] == [
        columns for name, _, columns in described if name == "some"
    ]
    assert said == [(f"9.{study}.1", [], None) for study in range(3)]


def test_one_file_serves_all_and_stays(settings: Settings) -> None:
    with QueryService(settings) as one, QueryService(settings) as two:
        assert (count(one), count(two)) == (4, 4)
    [path] = files(settings)
    made = path.stat().st_mtime_ns
    with QueryService(settings) as again:
        assert count(again) == 4
    assert files(settings) == [path]
    assert path.stat().st_mtime_ns == made


def test_a_new_version_is_seen_by_the_next_query(settings: Settings) -> None:
    with QueryService(settings) as service, QueryService(settings) as other:
        assert (count(service), count(other)) == (4, 4)
        [before] = files(settings)
        open_answers = service.find(Query.build("STUDY"))
        next(open_answers)
        write_catalog(settings, rows(6), files=2)
        assert (count(service), count(other)) == (6, 6)
        assert len(list(open_answers)) == 3, "an answer under way keeps its version"
        assert len(set(files(settings)) - {before}) == 1, "a refresh beside it"


def test_tables_appear_while_serving(tmp_path: Path) -> None:
    settings = archive(tmp_path)
    with QueryService(settings) as service:
        assert count(service) == 0
        write_catalog(settings, rows(2))
        assert count(service) == 2


def test_missing_index_is_built_again(settings: Settings) -> None:
    with QueryService(settings) as service:
        assert count(service) == 4
    for path in files(settings):
        path.unlink()
    with QueryService(settings) as service:
        assert count(service) == 4


@pytest.mark.parametrize("damage", [b"", b"not a database", b"\0" * 20000])
def test_damaged_index_is_built_again(settings: Settings, damage: bytes) -> None:
    with QueryService(settings) as service:
        assert count(service) == 4
    [path] = files(settings)
    path.write_bytes(damage)
    with QueryService(settings) as service:
        assert count(service) == 4


def test_index_damaged_inside(settings: Settings) -> None:
    with QueryService(settings) as service:
        assert count(service) == 4
    [path] = files(settings)
    data = bytearray(path.read_bytes())
    data[12288:-1] = b"\xff" * (len(data) - 12289)
    path.write_bytes(data)
    with QueryService(settings) as service:
        assert [str(match.identifier().StudyInstanceUID) for match in service.find(Query.build("STUDY"))] == [
            f"9.{number}" for number in range(4)
        ]


def test_leftovers_of_a_killed_builder_are_removed(settings: Settings) -> None:
    cache = IndexCache(settings)
    cache.current()
    write_catalog(settings, rows(6))
    path = cache.current().path
    leftover = path.with_name(path.name.removesuffix(".duckdb") + ".1.building")
    leftover.write_bytes(b"half")
    write_catalog(settings, rows(5))
    assert cache.current().path != path
    assert not leftover.exists()
    assert not path.exists()
    cache.close()


def test_questions_about_instances_open_only_their_files(settings: Settings) -> None:
    cache = IndexCache(settings)
    files, cursor = cache.current().files, cache.current().connection.cursor()
    assert len(files.all()) == 4
    assert len(files.of_studies(cursor, ["9.1"])) == 1
    assert len(files.of_studies(cursor, ["9.1", "9.3"])) == 2
    assert files.of_studies(cursor, ["9.99"]) == []
    assert files.of_instances(cursor, ["1.2.101", "1.2.301"]) == files.of_studies(cursor, ["9.1", "9.3"])
    cache.close()


def test_a_long_build_does_not_hold_up_answers(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    build = IndexFolder._refresh

    def slow(self: IndexFolder, *arguments: Any, **options: Any) -> None:
        time.sleep(0.5)
        build(self, *arguments, **options)

    with QueryService(settings) as service:
        assert count(service) == 4
        monkeypatch.setattr(IndexFolder, "_refresh", slow)
        monkeypatch.setattr(index_module, "REFRESH_WAIT_S", 0.05)
        write_catalog(settings, rows(5))
        assert count(service) == 4, "from the version before"
        until = time.monotonic() + 30
        while (found := count(service)) == 4 and time.monotonic() < until:
            time.sleep(0.02)
        assert found == 5


def test_changes_without_a_batch_are_taken_up_when_they_settle(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "SETTLE_S", 0.0)
    cache = IndexCache(settings)
    before = cache.current()
    (Path(settings.catalog_root.removeprefix("file://")) / "bundles").rename(settings.archive.state_dir / "away")
    write_catalog(settings, rows(5))
    (Path(settings.catalog_root.removeprefix("file://")) / "bundles").rename(settings.archive.state_dir / "new")
    (settings.archive.state_dir / "away").rename(Path(settings.catalog_root.removeprefix("file://")) / "bundles")
    assert cache.current() is before, "a batch may be under way"
    assert cache.current() is not before
    cache.close()


def test_a_table_that_cannot_be_read(settings: Settings) -> None:
    log = Path(settings.catalog_root.removeprefix("file://")) / "studies" / "_delta_log"
    for path in log.iterdir():
        path.write_text("{ not json")
    with QueryService(settings) as service, pytest.raises(CatalogError, match="catalog table studies"):
        count(service)


def test_data_files_that_are_gone(settings: Settings) -> None:
    with QueryService(settings) as service:
        assert count(service) == 4
        [path] = files(settings)
        for data in (Path(settings.catalog_root.removeprefix("file://")) / "instances").glob("*.parquet"):
            data.unlink()
        with pytest.raises(CatalogError, match="the catalog cannot be read"):
            list(service.find(Query.build("IMAGE")))
        assert count(service) == 4, "what the index holds is still answered"
        assert files(settings) == [path]


def test_storage_that_does_not_answer(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Any:
        raise CatalogError("away")

    monkeypatch.setattr(index_module, "SETTLE_S", 0.0)
    with QueryService(settings) as service:
        assert count(service) == 4
        write_catalog(settings, rows(5))
        for method in ("has_moved", "snapshot"):
            with monkeypatch.context() as patch:
                patch.setattr(CatalogTables, method, fail)
                assert count(service) == 4, "from the index at hand"
        assert count(service) == 5
    with monkeypatch.context() as patch, QueryService(settings) as service:
        patch.setattr(CatalogTables, "has_moved", fail)
        with pytest.raises(CatalogError, match="away"):
            count(service)


def ask(settings: Settings, counts: Any) -> None:
    with QueryService(settings) as service:
        counts.put(count(service))


def test_processes_that_start_together(settings: Settings) -> None:
    context = multiprocessing.get_context("spawn")
    counts = context.Queue()
    processes = [context.Process(target=ask, args=(settings, counts)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [counts.get(timeout=60) for _ in processes] == [4, 4]
    for process in processes:
        process.join()
    assert len(files(settings)) == 1


def test_made_in_a_process_of_its_own(settings: Settings, capfd: pytest.CaptureFixture[str]) -> None:
    with QueryService(settings, apart=True) as service:
        assert count(service) == 4
        write_catalog(settings, rows(5))
        assert count(service) == 5
        assert service.count(Query.build("STUDY"), as_of=0) == 4
    assert len(files(settings)) == 3, "a base, a refresh, and what was asked for of the past"
    assert "Fatal" not in capfd.readouterr().err, "each process ended by itself"


def test_who_serves_has_the_collector_leave_alone_what_stays(settings: Settings) -> None:
    """Once, when the first index is open; others, as notebooks are, keep their collector as it is."""
    gc.unfreeze()
    try:
        with QueryService(settings) as service:
            assert count(service) == 4
        assert gc.get_freeze_count() == 0
        with QueryService(settings, apart=True) as service:
            assert count(service) == 4
            frozen = gc.get_freeze_count()
            assert frozen > 10_000
            write_catalog(settings, rows(5))
            assert count(service) == 5
            assert 10_000 < gc.get_freeze_count() <= frozen, "some of it has gone, nothing came"
        assert gc.get_freeze_count() == 0, "and at the end it is as before"
    finally:
        gc.unfreeze()


def test_an_index_that_was_replaced_is_given_back_without_a_collection(settings: Settings) -> None:
    """As nothing of the first one is looked at by the collector again."""
    gc.collect()
    gc.disable()
    try:
        with QueryService(settings) as service:
            assert len(list(service.find(Query.build("STUDY")))) == 4
            first = weakref.ref(service._indexes.current())
            write_catalog(settings, rows(5))
            assert count(service) == 5
            assert first() is None
    finally:
        gc.enable()


def test_an_index_that_is_the_newest_is_opened_without_a_look_into_the_tables(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with QueryService(settings) as service:
        assert count(service) == 4
    monkeypatch.setattr(IndexProcess, "make", lambda self, as_of=None: pytest.fail("one was made"))
    with QueryService(settings, apart=True) as service:
        assert count(service) == 4


def test_another_catalog_at_that_place_with_the_same_versions(settings: Settings) -> None:
    with QueryService(settings) as service:
        assert count(service) == 4
    shutil.rmtree(Path(settings.catalog_root.removeprefix("file://")))
    write_catalog(settings, rows(3))
    with QueryService(settings) as service:
        assert count(service) == 3


def test_what_goes_wrong_in_a_process_of_its_own(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, QueryService(settings, apart=True) as service:
        patch.setattr("sys.executable", shutil.which("false"))
        with pytest.raises(CatalogError, match="no index was made: its process ended with 1"):
            count(service)
    log = Path(settings.catalog_root.removeprefix("file://")) / "studies" / "_delta_log"
    for path in log.iterdir():
        path.write_text("{ not json")
    with QueryService(settings, apart=True) as service, pytest.raises(CatalogError, match="catalog table studies"):
        count(service)


def test_closing_ends_the_process_that_makes_one(settings: Settings) -> None:
    folder = settings.archive.state_dir / "index"
    folder.mkdir(parents=True)
    maker = IndexProcess(settings, None)
    ended: list[str] = []

    def make() -> None:
        with pytest.raises(CatalogError, match="its process ended with -9") as error:
            maker.make()
        ended.append(str(error.value))

    with (folder / "build.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # somebody else makes one, and takes long
        making = threading.Thread(target=make)
        making.start()
        until = time.monotonic() + 30
        while making.is_alive() and time.monotonic() < until:
            maker.close()
            making.join(0.05)
    assert len(ended) == 1


def test_the_process_that_makes_one_ends_with_who_started_it(settings: Settings) -> None:
    folder = settings.archive.state_dir / "index"
    folder.mkdir(parents=True)
    code = (
        "import pickle, sys; from sphere.catalog.index_process import IndexProcess; "
        "IndexProcess(pickle.load(sys.stdin.buffer), None).make()"
    )
    with (folder / "build.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, cwd=ROOT) as parent:
            assert parent.stdin is not None
            parent.stdin.write(pickle.dumps(settings))
            parent.stdin.flush()
            until = time.monotonic() + 60
            while not (children := psutil.Process(parent.pid).children()) and time.monotonic() < until:
                time.sleep(0.02)
            parent.kill()
        assert len(children) == 1
        assert psutil.wait_procs(children, timeout=60)[1] == []
