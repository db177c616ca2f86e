"""The catalog's readers and its lock, on local disk and on HDFS alike."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from sphere.catalog.lock import CatalogLock
from sphere.catalog.query import Query
from sphere.catalog.service import QueryService
from sphere.catalog.tables import CatalogTables
from sphere.conf.errors import LockHeld
from sphere.conf.settings import Settings, from_dict
from tests.contract.backends import Backend, Hdfs, Local
from tests.support.catalog import Row, instance, write_catalog
from tests.support.hdfs import HdfsCluster


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
        settings = from_dict({}, base=tmp_path)
        return settings.model_copy(update={"storage": settings.storage.model_copy(update={"root": url})})

    def test_answers_follow_the_tables(self, archive: Settings) -> None:
        with QueryService(archive) as service:
            assert service.count(Query.build("STUDY")) == 0
            write_catalog(archive, rows(3))
            assert service.count(Query.build("STUDY")) == 3
            images = service.find(Query.build("IMAGE", {"StudyInstanceUID": "9.1"}))
            assert [match.identifier().SOPInstanceUID for match in images] == ["1.2.2", "1.2.3"]
            write_catalog(archive, rows(5))
            assert service.count(Query.build("STUDY")) == 5
            assert len(list(service.lookup_instances(study=["9.4"]))) == 2

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
    connection = CatalogTables(settings).connect(tmp_path / "x.duckdb", read_only=False, memory_limit="64MB", threads=1)
    child = subprocess.run(["true"], preexec_fn=lambda: None, timeout=60, check=False)
    assert child.returncode == 0
    connection.close()
