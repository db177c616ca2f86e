"""An archive whose bundles are on webhdfs://, whole: received, found, extracted, found again, given back byte for byte.

Its tables are on hdfs:// of the same cluster, or on a local disk: Delta tables cannot be read over webhdfs://.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from pydicom import dcmread
from pyspark.sql import SparkSession

from sphere.ingest.journal import Landed
from sphere.ingest.recovery import verify
from sphere.ingest.storage import open_storage
from sphere.jobs.extract import run
from tests.support.dicom_tools import findscu, part10_dataset, run_tool
from tests.support.hdfs import HdfsCluster
from tests.support.landing import slices
from tests.support.receiver import Receiver, running_receiver

pytestmark = [pytest.mark.spark, pytest.mark.hdfs, pytest.mark.interop]


def studies(receiver: Receiver, folder: Path) -> dict[str, int]:
    """What C-FIND finds: studies, with their numbers of instances."""
    keys = ("QueryRetrieveLevel=STUDY", "StudyInstanceUID", "NumberOfStudyRelatedInstances")
    answers = findscu(receiver.port, folder, keys, "-S")
    return {one.StudyInstanceUID: int(one.NumberOfStudyRelatedInstances) for one in answers}


def got(receiver: Receiver, uids: list[str], folder: Path) -> dict[str, bytes]:
    """The data sets that C-GET of the studies brings, by SOP Instance UID."""
    folder.mkdir()
    keys = ("-k", "QueryRetrieveLevel=STUDY", "-k", "StudyInstanceUID=" + "\\".join(uids))
    run_ = run_tool("getscu", "+B", "-S", "-od", folder, *keys, "127.0.0.1", receiver.port)
    assert run_.returncode == 0, run_.stdout
    return {dcmread(path).SOPInstanceUID: part10_dataset(path.read_bytes()) for path in folder.iterdir()}


@pytest.mark.parametrize("tables", ["hdfs", "file"])
def test_an_archive_on_webhdfs(spark: SparkSession, hdfs_cluster: HdfsCluster, tmp_path: Path, tables: str) -> None:
    made = tmp_path / "made"
    made.mkdir()
    sent: dict[str, bytes] = {}
    for number, data in enumerate([*slices(3, seed=41), *slices(2, seed=42, study=1)]):
        (made / f"{number}.dcm").write_bytes(data)
        sent[dcmread(made / f"{number}.dcm").SOPInstanceUID] = part10_dataset(data)
    root = f"{hdfs_cluster.hdfs_url}/web-{tables}/catalog" if tables == "hdfs" else "file:catalog"
    sections = {"storage": {"root": f"{hdfs_cluster.webhdfs_url}/web-{tables}"}, "catalog": {"root": root}}
    sections["spark"] = {"shuffle_partitions": 2}
    with running_receiver(tmp_path / "archive", sections) as receiver:
        run_tool("storescu", "-xe", "127.0.0.1", receiver.port, *sorted(made.iterdir()))
        assert receiver.log.count("status=0x0000") == len(sent) == 5
        found = studies(receiver, tmp_path / "before")
        assert sorted(found.values()) == [2, 3]
        report = run(spark, receiver.settings)
        assert (report.read, report.rows, report.rejected) == (5, 5, 0)
        assert run(spark, receiver.settings).read == 0
        assert studies(receiver, tmp_path / "after") == found
        assert got(receiver, list(found), tmp_path / "got") == sent
    storage = open_storage(receiver.settings.storage.root)
    [bundle] = [state.bundle for state in Landed(storage).bundles() if state.sealed]
    assert (verify(storage, bundle).members, verify(storage, bundle).problems) == (5, ())
