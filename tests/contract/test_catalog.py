"""The catalog's readers and its lock, on local disk and on HDFS alike."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from sphere.catalog import index
from sphere.catalog.index_folder import IndexFolder
from sphere.catalog.lock import CatalogLock
from sphere.catalog.query import Query
from sphere.catalog.service import QueryService
from sphere.catalog.tables import CatalogTables
from sphere.conf.errors import LockHeld
from sphere.conf.loading import from_dict
from sphere.conf.settings import Settings
from sphere.ingest.bundle import BundleWriter
from sphere.ingest.storage import open_storage
from tests.contract.backends import Backend, Hdfs, Local
from tests.support.catalog import Row, instance, write_catalog
from tests.support.hdfs import HdfsCluster
from tests.support.landing import new_member, slices


def rows(studies: int) -> list[Row]:
    return [
        instance(
            number,
            StudyInstanceUID=f"9.{number // 2}",
            SeriesInstanceUID=f"8.{number // 2}",
            PatientID="P",
            IssuerOfPatientID=None,
            Modality="CT",
        )
        for number in range(2 * studies)
    ]


class CatalogContract(Backend):
    """Every promise once."""

    @pytest.fixture
    def archive(self, url: str, tmp_path: Path) -> Settings:
        """Settings whose catalog is on this storage too."""
        settings = from_dict({"extract": {"lock_wait_s": 0}}, base=tmp_path)
        return settings.model_copy(update={"storage": settings.storage.model_copy(update={"root": url})})

    def test_answers_follow_the_tables(self, archive: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(index, "REFRESH_WAIT_S", 60.0)  # no journal has these rows: only a new index does
        with QueryService(archive) as service:
            assert service.count(Query.build("STUDY")) == 0
            write_catalog(archive, rows(3))
            assert service.count(Query.build("STUDY")) == 3
            images = service.find(Query.build("IMAGE", {"StudyInstanceUID": "9.1"}))
            assert [match.identifier().SOPInstanceUID for match in images] == ["1.2.2", "1.2.3"]
            write_catalog(archive, rows(5))
            assert service.count(Query.build("STUDY")) == 5
            assert len(list(service.lookup_instances(study=["9.4"]))) == 2

    def test_the_newest_index_is_opened_without_delta_rs(
        self, archive: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_catalog(archive, rows(3))
        with QueryService(archive) as service:
            assert service.count(Query.build("STUDY")) == 3
        with monkeypatch.context() as patch, QueryService(archive) as service:
            patch.setattr(IndexFolder, "make", lambda self, as_of=None: pytest.fail("tables were read"))
            assert service.count(Query.build("STUDY")) == 3
        write_catalog(archive, rows(5))
        with QueryService(archive) as service:
            assert service.count(Query.build("STUDY")) == 5

    def test_what_was_stored_is_found_at_once(self, archive: Settings) -> None:
        member = new_member(slices(1)[0])
        uids = {"StudyInstanceUID": member.StudyInstanceUID, "SOPInstanceUID": member.SOPInstanceUID}
        writer = BundleWriter(open_storage(archive.storage.root), archive)
        other_host = archive.model_copy(
            update={"archive": archive.archive.model_copy(update={"state_dir": archive.archive.state_dir / "other"})}
        )
        with QueryService(archive) as service, QueryService(other_host) as other:
            assert (service.count(Query.build("IMAGE")), other.count(Query.build("IMAGE"))) == (0, 0)
            writer.store(member)
            assert service.count(Query.build("IMAGE", uids)) == 1
            until = time.monotonic() + 20
            for one in (service, other):
                while not one.count(Query.build("STUDY", {"PatientID": "*?"})) and time.monotonic() < until:
                    time.sleep(0.05)
                assert one.count(Query.build("STUDY", {"PatientID": "*?"})) == 1, "by its header, once published"
            writer.close()
            assert service.count(Query.build("IMAGE")) == other.count(Query.build("IMAGE")) == 1

    def test_one_writer_at_a_time(self, archive: Settings) -> None:
        for _ in range(2):
            with CatalogLock(archive, job="extract") as lock:
                lock.check()
                with pytest.raises(LockHeld, match="being written by extract"), CatalogLock(archive, job="compact"):
                    pass


class TestLocal(Local, CatalogContract):
    """file:///"""


class TestHdfs(Hdfs, CatalogContract):
    """hdfs://"""


@pytest.mark.hdfs
def test_a_process_that_asked_hdfs_can_still_fork(hdfs_cluster: HdfsCluster, tmp_path: Path) -> None:
    """As PySpark does when it starts Java: closing a client in the child of a fork would hang it for good."""
    settings = from_dict({"storage": {"root": f"{hdfs_cluster.hdfs_url}/contract/fork"}}, base=tmp_path)
    connection = CatalogTables(settings).connect(tmp_path / "x.duckdb", memory_limit="64MB", threads=1)
    child = subprocess.run(["true"], preexec_fn=lambda: None, timeout=60, check=False)
    assert child.returncode == 0
    connection.close()
