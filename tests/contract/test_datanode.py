"""A DataNode dies while instances land: nothing acknowledged is lost, and landing goes on by itself."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from sphere.conf.errors import StorageError
from sphere.conf.loading import from_dict
from sphere.ingest.bundle import BundleWriter
from sphere.ingest.recovery import recover
from sphere.ingest.storage import open_storage
from tests.support.bundles import PREAMBLE, all_records, assert_sound, dataset_bytes, member_bytes, new_member
from tests.support.hdfs import HdfsCluster


@pytest.mark.hdfs
@pytest.mark.faults
def test_a_datanode_is_killed(expendable_hdfs_cluster: HdfsCluster, tmp_path: Path) -> None:
    archive = from_dict({"storage": {"root": f"{expendable_hdfs_cluster.hdfs_url}/datanode"}}, base=tmp_path)
    storage = open_storage(archive.storage.root)
    writer = BundleWriter(storage, archive)
    numbers = itertools.count()
    acknowledged = {number: writer.store(new_member(number)) for number in itertools.islice(numbers, 20)}
    expendable_hdfs_cluster.kill_datanode()
    refused = 0
    for number in numbers:
        try:
            acknowledged[number] = writer.store(new_member(number))
        except StorageError:
            refused += 1
        if len(acknowledged) == 40:
            break
    assert refused < 20
    expendable_hdfs_cluster.start_datanodes()
    writer.close()
    recover(storage, archive)
    assert_sound(storage)
    present = all_records(storage)
    for number, record in acknowledged.items():
        assert present.count(record) == 1
        assert member_bytes(storage, record) == PREAMBLE + dataset_bytes(number)
