"""HDFS loses a DataNode or its NameNode while instances land over C-STORE.

After the loss of a DataNode landing stalls for about as long as the NameNode needs to take it for dead (14 s in this
cluster): what comes meanwhile is refused, and nothing acknowledged is lost.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from sphere.ingest.spool import backlog
from sphere.scp.store import OUT_OF_RESOURCES
from tests.support.hdfs import HdfsCluster
from tests.support.ledger import Ledger, Senders, audit
from tests.support.serving import Serving, ready, running_supervisor, send_signal

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


KILLS = 4  # of the shipper while it drains


def test_the_spool_outlasts_hdfs(expendable_hdfs_cluster: HdfsCluster, tmp_path: Path) -> None:
    """The NameNode is away while instances arrive: every one is answered with Success, and what waits drains by itself,
    each instance once, although the shipper is killed again and again."""
    ledger = Ledger()
    root = f"{expendable_hdfs_cluster.hdfs_url}/faults/spool"
    spooled = {"durability": "spool", "spool_seal_s": 1}
    with running_supervisor(tmp_path, root=root, workers=2, ingest=spooled) as serving:
        with Senders(ledger, serving.port, count=3, pause_s=0.01):
            ledger.wait_for_count(100)
            expendable_hdfs_cluster.kill_namenode()
            away = time.monotonic()
            ledger.wait_for_count(300)
            serving.wait(lambda state: state.spool is not None and bool(state.spool.error))
            assert time.monotonic() - max(ledger.acknowledged.values()) < 1  # nobody was kept waiting
        for _ in range(3):  # bundles of several receivers, all of them unfinished
            for child in serving.state().children:
                if child.name.startswith("receiver"):
                    send_signal(child, signal.SIGKILL)
            serving.wait(ready)
            with Senders(ledger, serving.port, count=3):
                ledger.wait_for_count(50)
        expendable_hdfs_cluster.start_namenode()
        print(f"\nHDFS was away for {time.monotonic() - away:.0f} s")
        for _ in range(KILLS):
            _kill_shipper(serving)
        state = serving.wait(lambda state: ready(state) and state.spool is not None and not state.spool.bundles)
        assert state.spool is not None
        assert not state.spool.failing_since
        assert serving.stop() == 0
    assert ledger.refused == {}
    assert backlog(serving.settings).bundles == 0
    audit(ledger, serving.settings)


def _kill_shipper(serving: Serving) -> None:
    state = serving.wait(ready)
    child = next(child for child in state.children if child.name == "shipper")
    time.sleep(0.3)
    send_signal(child, signal.SIGKILL)
    serving.wait(lambda state: next(c for c in state.children if c.name == "shipper").restarts > child.restarts)
