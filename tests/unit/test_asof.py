"""Queries against an earlier catalog: a cohort can be asked again."""

from __future__ import annotations

import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable

import sphere
from sphere.archive import Archive
from sphere.catalog import index as index_module
from sphere.catalog.query import Query
from sphere.catalog.service import QueryService
from sphere.conf.errors import CatalogError
from sphere.conf.settings import Settings
from sphere.ingest.bundle import BundleWriter
from sphere.ingest.storage import open_storage
from tests.support.catalog import archive
from tests.support.extracted import extract
from tests.support.landing import changed, new_member, slices

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Three batches of two instances; then one more and another version of one, which are not extracted."""
    settings = archive(tmp_path_factory.mktemp("grown"))
    data = slices(7)
    for batch in range(3):
        writer = BundleWriter(open_storage(settings.storage.root), settings)
        for number in (2 * batch, 2 * batch + 1):
            writer.store(new_member(data[number], second=number))
        writer.close()
        extract(settings)
        time.sleep(0.002)
    writer = BundleWriter(open_storage(settings.storage.root), settings)
    writer.store(new_member(data[6], second=6))
    writer.store(new_member(changed(data[0], PatientComments="later"), second=7))
    writer.close()
    return settings


def committed(settings: Settings, version: int) -> datetime:
    """When a version of `bundles` was committed."""
    history = DeltaTable(f"{settings.catalog_root}/bundles").history()
    [millis] = [commit["timestamp"] for commit in history if commit["version"] == version]
    return datetime.fromtimestamp(millis / 1000, timezone.utc)


def test_versions_and_times(grown: Settings) -> None:
    with QueryService(grown) as service:
        query = Query.build("IMAGE")
        assert service.count(query) == 7
        for version in (0, 1, 2):
            at = committed(grown, version)
            naive = at.replace(tzinfo=None)
            counts = [service.count(query, as_of=when) for when in (version, at, naive, at + timedelta(milliseconds=1))]
            assert counts == [2 * version + 2] * 4
            assert len(list(service.lookup_instances(as_of=version))) == 2 * version + 2
            [study] = service.find(Query.build("STUDY", return_keys=["NumberOfStudyRelatedInstances"]), as_of=version)
            assert study.identifier().NumberOfStudyRelatedInstances == 2 * version + 2
        assert service.count(query) == 7


@pytest.mark.parametrize("as_of", [3, -1, datetime(2001, 1, 1), datetime(2001, 1, 1, tzinfo=timezone.utc)])
def test_no_such_version(grown: Settings, as_of: Any) -> None:
    with QueryService(grown) as service, pytest.raises(CatalogError, match="versions 0 to 2 are known"):
        service.count(Query.build("STUDY"), as_of=as_of)


def test_nothing_extracted(tmp_path: Path) -> None:
    with QueryService(archive(tmp_path)) as service, pytest.raises(CatalogError, match="nothing was extracted yet"):
        service.count(Query.build("STUDY"), as_of=0)


def test_few_earlier_indexes_are_kept(grown: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "PAST", 1)
    folder = grown.archive.state_dir / "index"
    for path in folder.glob("past-*"):
        path.unlink()
    with QueryService(grown) as service:
        for version in (0, 1, 2, 0):
            assert service.count(Query.build("IMAGE"), as_of=version) == 2 * version + 2
        assert len(list(folder.glob("past-*"))) <= 1
        [kept] = folder.glob("past-*")
    kept.write_bytes(b"damaged")
    with QueryService(grown) as service:
        assert service.count(Query.build("IMAGE"), as_of=0) == 2


def test_python_api(grown: Settings) -> None:
    opened: Archive = sphere.Archive(grown)
    asked = {"as_of": 1, "return_keys": ["NumberOfSeriesRelatedInstances"]}
    [series] = opened.find("SERIES", {"Modality": "CT"}, **asked)  # type: ignore[arg-type]
    assert series["NumberOfSeriesRelatedInstances"] == 4
