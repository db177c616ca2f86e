"""The three back ends, each as a class of fixtures that a contract is combined with."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from sphere.conf.loading import from_dict
from sphere.conf.settings import Settings
from sphere.ingest.storage import Storage, open_storage
from tests.support.hdfs import HdfsCluster

_numbers = itertools.count()


@pytest.mark.unit
class Local:
    """A folder of this host."""

    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return (tmp_path / "storage folder").as_uri()


@pytest.mark.hdfs
class Hdfs:
    """The native protocol."""

    @pytest.fixture
    def url(self, hdfs_cluster: HdfsCluster) -> str:
        return f"{hdfs_cluster.hdfs_url}/contract/native{next(_numbers)}"


@pytest.mark.hdfs
class WebHdfs:
    """HTTP."""

    @pytest.fixture
    def url(self, hdfs_cluster: HdfsCluster) -> str:
        return f"{hdfs_cluster.webhdfs_url}/contract/web{next(_numbers)}"


class Backend:
    """Fixtures on top of `url`."""

    @pytest.fixture
    def storage(self, url: str) -> Storage:
        """A storage whose root does not exist yet."""
        return open_storage(url)

    @pytest.fixture
    def other(self, url: str) -> Storage:
        """The same storage as another process sees it."""
        return open_storage(url)

    @pytest.fixture
    def archive(self, url: str, tmp_path: Path) -> Settings:
        """Settings with this storage."""
        settings = from_dict({"catalog": {"root": "file:catalog"}}, base=tmp_path)
        return settings.model_copy(update={"storage": settings.storage.model_copy(update={"root": url})})
