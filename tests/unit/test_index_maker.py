"""One process of the host stays ready to make indexes: shared, ahead of who asks, and no loss when it dies."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sphere.catalog import index as index_module
from sphere.catalog import index_maker as maker_module
from sphere.catalog.index_folder import IndexFolder
from sphere.catalog.index_maker import IndexMaker
from sphere.catalog.index_process import IndexProcess
from sphere.catalog.query import Query
from sphere.catalog.service import QueryService
from sphere.catalog.tables import CatalogTables
from sphere.conf.errors import CatalogError
from sphere.conf.settings import Settings
from tests.support.catalog import archive, write_catalog
from tests.support.makers import WITHIN_S, count, eventually, leave_out_others, makers, rows
from tests.support.receiver import ROOT

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers come from the newest version, and the maker is wanted at once."""
    leave_out_others()
    monkeypatch.setattr(index_module, "REFRESH_WAIT_S", 60.0)
    monkeypatch.setattr(maker_module, "HOLD_S", 0.0)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    made = archive(tmp_path)
    write_catalog(made, rows(4))
    return made


@pytest.fixture
def service(settings: Settings) -> Iterator[QueryService]:
    """One that serves, with the maker ready."""
    with QueryService(settings, apart=True) as opened:
        assert count(opened) == 4
        eventually(makers)
        yield opened


def test_it_makes_the_next_version(service: QueryService, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IndexProcess, "make", lambda self, as_of=None: pytest.fail("a process was started"))
    write_catalog(settings, rows(5))
    assert count(service) == 5
    assert service.count(Query.build("STUDY"), as_of=0) == 4
    with pytest.raises(CatalogError, match="no version as of 9"):
        service.count(Query.build("STUDY"), as_of=9)
    assert len(makers()) == 1


def test_a_version_is_there_before_anybody_asks(service: QueryService, settings: Settings) -> None:
    write_catalog(settings, rows(5))
    eventually(lambda: IndexFolder(settings).newest())
    with QueryService(settings) as other:
        assert count(other) == 5
    assert count(service) == 5


def test_all_who_serve_share_it_and_the_last_one_ends_it(service: QueryService, settings: Settings) -> None:
    [maker] = makers()
    other = QueryService(settings, apart=True)
    assert count(other) == 4
    asked = IndexMaker(settings)
    asked.hold()
    eventually(lambda: len(maker.net_connections("unix")) >= 4)  # what it listens on, and three that hold it
    other.close()
    asked.close()
    write_catalog(settings, rows(5))
    assert count(service) == 5
    assert makers() == [maker]
    service.close()
    assert psutil.wait_procs([maker], timeout=WITHIN_S)[1] == []


def test_killed_it_costs_nothing_but_its_start(service: QueryService, settings: Settings) -> None:
    for studies in (5, 6):
        [maker] = makers()
        maker.kill()
        maker.wait()
        write_catalog(settings, rows(studies))
        assert count(service) == studies
        assert [one.pid for one in makers()] != [maker.pid]


def test_who_cannot_start_it_has_indexes_made_one_by_one(
    service: QueryService, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: IndexMaker, address: str) -> None:
        raise PermissionError(13, "no sockets here")

    monkeypatch.setattr(IndexMaker, "_start", refused)
    [maker] = makers()
    maker.kill()
    maker.wait()
    write_catalog(settings, rows(5))
    assert count(service) == 5
    assert makers() == []


def test_what_is_made_from_nothing_has_a_process_of_its_own(service: QueryService, settings: Settings) -> None:
    [maker] = makers()
    shutil.rmtree(Path(settings.catalog_root.removeprefix("file://")))
    for _ in range(2):  # a version beyond that of the index
        write_catalog(settings, rows(3))
    eventually(lambda: count(service) == 3)
    assert makers() == [maker]
    log = Path(settings.catalog_root.removeprefix("file://")) / "studies" / "_delta_log"
    for path in log.iterdir():
        path.write_text("{ not json")
    asked = IndexMaker(settings)
    asked.hold()
    eventually(lambda: asked._held)
    with pytest.raises(CatalogError, match="catalog table studies"):
        asked.make()
    asked.close()


def test_archives_that_share_a_state_folder_do_not_share_it(
    service: QueryService, settings: Settings, tmp_path: Path
) -> None:
    elsewhere = archive(tmp_path / "other")
    write_catalog(elsewhere, rows(7))
    elsewhere = elsewhere.model_copy(update={"archive": settings.archive})
    with QueryService(elsewhere, apart=True) as other:
        assert count(other) == 7
        eventually(lambda: len(makers()) == 2)
        write_catalog(elsewhere, rows(8))
        assert count(other) == 8
        assert count(service) == 4


def test_a_folder_whose_path_is_too_long_for_a_socket(tmp_path: Path) -> None:
    settings = archive(tmp_path / ("long" * 30))
    write_catalog(settings, rows(4))
    with QueryService(settings, apart=True) as service:
        assert count(service) == 4
        eventually(makers)
        write_catalog(settings, rows(5))
        assert count(service) == 5


def test_an_archive_without_tables_needs_no_process_and_no_delta(tmp_path: Path) -> None:
    code = (
        "import sys, subprocess; from pathlib import Path; from sphere.catalog.query import Query; "
        "from sphere.catalog.service import QueryService; from sphere.conf.loading import from_dict; "
        "service = QueryService(from_dict({}, base=Path(sys.argv[1])), apart=True); subprocess.Popen = None; "
        "assert service.count(Query.build('STUDY')) == 0; print('deltalake' in sys.modules); service.close()"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=False, cwd=ROOT, capture_output=True, text=True
    )
    assert ran.stdout == "False\n", ran.stderr
    settings = archive(tmp_path)
    with QueryService(settings, apart=True) as service:
        assert count(service) == 0
        write_catalog(settings, rows(4))
        assert count(service) == 4


def test_a_table_is_there_as_long_as_its_log_has_a_file(settings: Settings) -> None:
    tables = CatalogTables(settings)
    assert tables.exists("instances")
    assert not tables.exists("pulls")
    log = Path(settings.catalog_root.removeprefix("file://")) / "instances" / "_delta_log"
    for path in log.iterdir():
        path.rename(path.with_name("00000000000000000010.checkpoint.parquet"))
    assert tables.exists("instances")
    shutil.rmtree(log)
    assert not tables.exists("instances")
    log.write_text("no folder")
    assert not tables.exists("instances")
