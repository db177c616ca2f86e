"""HDFS loses a DataNode or its NameNode while instances land over C-STORE.

After the loss of a DataNode landing stalls for about as long as the NameNode needs to take it for dead (14 s in this
cluster): what comes meanwhile is refused, and nothing acknowledged is lost.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from sphere.scp.store import OUT_OF_RESOURCES
from tests.support.hdfs import HdfsCluster
from tests.support.ledger import Ledger, Senders, audit
from tests.support.serving import ready, running_supervisor

pytestmark = [pytest.mark.faults, pytest.mark.hdfs]

DEAD_S = 60.0  # seconds: 14 for the NameNode, the deadlines of the calls under way, and a busy machine


@pytest.mark.parametrize("node", ["DataNode", "NameNode"])
def test_a_node_is_killed_and_comes_back(expendable_hdfs_cluster: HdfsCluster, tmp_path: Path, node: str) -> None:
    ledger = Ledger()
    root = f"{expendable_hdfs_cluster.hdfs_url}/faults/{node}"
    with running_supervisor(tmp_path, root=root, workers=1) as serving:
        with Senders(ledger, serving.port, count=3, pause_s=0.01):
            ledger.wait_for_count(50)
            killed = time.monotonic()
            if node == "DataNode":
                expendable_hdfs_cluster.kill_datanode()
                try:
                    ledger.wait_for_success(killed + 0.5, within_s=DEAD_S)  # on the other one
                    print(f"\nresumed {time.monotonic() - killed:.1f} s after the kill")
                finally:
                    expendable_hdfs_cluster.start_datanodes()
            else:
                expendable_hdfs_cluster.kill_namenode()
                time.sleep(1)
                expendable_hdfs_cluster.start_namenode()
            back = time.monotonic()
            ledger.wait_for_success(back)
            print(f"\nresumed {time.monotonic() - back:.1f} s after the {node} was back")
            ledger.wait_for_count(50)
        assert set(ledger.refused) <= {OUT_OF_RESOURCES}
        serving.wait(ready)
        assert serving.stop() == 0
    audit(ledger, serving.settings)
