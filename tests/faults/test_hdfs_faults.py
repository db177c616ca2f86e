"""HDFS loses a DataNode or its NameNode while instances land over C-STORE: nothing acknowledged is lost, and service
resumes by itself within 10 s."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest

from sphere.ingest.spool import backlog
from sphere.scp.store import OUT_OF_RESOURCES
from tests.support.hdfs import HdfsCluster, hdfs_for_test
from tests.support.ledger import RESUME_S, Ledger, Senders, audit
from tests.support.ports import free_port
from tests.support.serving import Serving, ready, running_supervisor, send_signal

pytestmark = [pytest.mark.faults, pytest.mark.hdfs]


@pytest.fixture
def forgetful_hdfs_cluster(tmp_path: Path) -> Iterator[HdfsCluster]:
    """A cluster whose NameNode takes a DataNode for dead after 10 minutes, as by HDFS's own defaults."""
    with hdfs_for_test(tmp_path / "hdfs", recheck_s=300) as cluster:
        yield cluster


def test_a_datanode_is_killed(forgetful_hdfs_cluster: HdfsCluster, tmp_path: Path) -> None:
    """Landing goes on with the other one although the NameNode offers the dead one for every new block."""
    ledger = Ledger()
    root = f"{forgetful_hdfs_cluster.hdfs_url}/faults/datanode"
    with running_supervisor(tmp_path, root=root, workers=1) as serving:
        with Senders(ledger, serving.port, count=3, pause_s=0.01):
            ledger.wait_for_count(50)
            forgetful_hdfs_cluster.kill_datanode()
            killed = time.monotonic()
            ledger.wait_for_success(killed + 0.5)
            ledger.wait_for_count(600)
            time.sleep(max(0.0, killed + RESUME_S - time.monotonic()))
            ledger.wait_for_success(time.monotonic())
        gap = ledger.longest_gap(killed)
        forgetful_hdfs_cluster.start_datanodes()
        assert serving.stop() == 0
    print(f"\nat most {gap:.1f} s without a Success, {sum(ledger.refused.values())} refused")
    assert gap < RESUME_S
    assert ledger.refused == {}
    audit(ledger, serving.settings)


def test_the_namenode_is_killed_and_comes_back(expendable_hdfs_cluster: HdfsCluster, tmp_path: Path) -> None:
    ledger = Ledger()
    root = f"{expendable_hdfs_cluster.hdfs_url}/faults/namenode"
    away = {"status": "not ready", "not_ready": ["storage"]}
    with running_supervisor(tmp_path, root=root, workers=1, web=True) as serving:
        with Senders(ledger, serving.port, count=3, pause_s=0.01):
            ledger.wait_for_count(50)
            assert _readyz(serving) == (200, {"status": "ready", "not_ready": []})
            expendable_hdfs_cluster.kill_namenode()
            _wait_for_readyz(serving, (503, away))
            expendable_hdfs_cluster.start_namenode()
            back = time.monotonic()
            ledger.wait_for_success(back)
            print(f"\nresumed {time.monotonic() - back:.1f} s after the NameNode was back")
            ledger.wait_for_count(50)
        _wait_for_readyz(serving, (200, {"status": "ready", "not_ready": []}))
        assert set(ledger.refused) <= {OUT_OF_RESOURCES}
        assert serving.stop() == 0
    audit(ledger, serving.settings)


HANG_S = 20.0  # seconds that a part of HDFS hangs


@pytest.mark.parametrize("kind", ["namenode", "datanode"])
def test_hdfs_hangs(forgetful_hdfs_cluster: HdfsCluster, tmp_path: Path, kind: Literal["namenode", "datanode"]) -> None:
    """Who connects gets no answer: every C-STORE is refused in time, also on an association that began meanwhile, and
    the same receiver goes on when HDFS does."""
    ledger = Ledger()
    root = f"{forgetful_hdfs_cluster.hdfs_url}/faults/hangs"
    with running_supervisor(tmp_path, root=root, workers=1, web=True) as serving:
        with Senders(ledger, serving.port, count=3, pause_s=0.1):  # they wait 20 s for an answer, and for no more
            ledger.wait_for_count(50)
            with forgetful_hdfs_cluster.stopped(kind):
                time.sleep(HANG_S)
                with Senders(ledger, serving.port, count=3, pause_s=0.1):
                    refused = ledger.refused[OUT_OF_RESOURCES]
                    time.sleep(HANG_S)
                assert _readyz(serving) == (503, {"status": "not ready", "not_ready": ["storage"]})
                assert ledger.refused[OUT_OF_RESOURCES] > refused > 0
            back = time.monotonic()
            ledger.wait_for_success(back)
            took = f"answers took {ledger.slowest:.1f} s at most"
            print(f"\nresumed {time.monotonic() - back:.1f} s after it went on; {took}")
            ledger.wait_for_count(50)
            _wait_for_readyz(serving, (200, {"status": "ready", "not_ready": []}))
        assert [child.restarts for child in serving.state().children] == [0, 0]
        assert serving.stop() == 0
    assert set(ledger.refused) == {OUT_OF_RESOURCES}
    assert ledger.broken == 0
    audit(ledger, serving.settings)


def _readyz(serving: Serving) -> tuple[int, dict[str, Any]]:
    answer = httpx.get(f"http://127.0.0.1:{serving.state().web_port}/readyz", timeout=30)
    return answer.status_code, answer.json()


def _wait_for_readyz(serving: Serving, wanted: tuple[int, dict[str, Any]]) -> None:
    deadline = time.monotonic() + 40
    while (said := _readyz(serving)) != wanted:
        assert time.monotonic() < deadline, said
        time.sleep(0.2)


KILLS = 4  # of the shipper while it drains


def test_the_spool_outlasts_hdfs(
    expendable_hdfs_cluster: HdfsCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The NameNode is away while instances arrive: every one is answered with Success, and what waits drains by itself,
    each instance once, although the shipper is killed again and again."""
    monkeypatch.setenv("SPHERE_STORAGE__SEAL_MIB", "4")  # the shipper needs one that is sealed to miss HDFS
    ledger = Ledger()
    root = f"{expendable_hdfs_cluster.hdfs_url}/faults/spool"
    spooled = {"durability": "spool", "spool_seal_s": 1}
    with running_supervisor(tmp_path, root=root, workers=2, web=True, ingest=spooled) as serving:
        with Senders(ledger, serving.port, count=3, pause_s=0.01):
            ledger.wait_for_count(100)
            expendable_hdfs_cluster.kill_namenode()
            away = time.monotonic()
            ledger.wait_for_count(300)
            serving.wait(lambda state: state.spool is not None and bool(state.spool.error))
            assert time.monotonic() - max(ledger.acknowledged.values()) < 1  # nobody was kept waiting
            _wait_for_readyz(serving, (200, {"status": "ready", "not_ready": [], "away": ["storage"]}))
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


def test_an_outage_longer_than_the_shipper_waits(tmp_path: Path) -> None:
    """It ends itself again and again (after 2 s here) while nothing answers; what waits drains by itself, each once."""
    ledger, port = Ledger(), free_port()
    spooled = {"durability": "spool", "spool_seal_s": 1}
    root = f"hdfs://127.0.0.1:{port}/faults/outage"
    module = "tests.support.short_serve"
    with running_supervisor(tmp_path, root=root, workers=1, ingest=spooled, module=module) as serving:
        for restarts in (0, 2):
            serving.wait(lambda state: state.children[1].restarts >= restarts)  # noqa: B023
            with Senders(ledger, serving.port, count=2):
                ledger.wait_for_count(50)
        assert backlog(serving.settings).bundles >= 2
        with hdfs_for_test(tmp_path / "hdfs", rpc_port=port):
            state = serving.wait(lambda state: ready(state) and state.spool is not None and not state.spool.bundles)
            assert state.children[1].last_end == "status 1"
            assert state.children[0].restarts == 0
            assert serving.stop() == 0
            assert backlog(serving.settings).bundles == 0
            assert ledger.refused == {}
            audit(ledger, serving.settings)


def _kill_shipper(serving: Serving) -> None:
    state = serving.wait(ready)
    child = next(child for child in state.children if child.name == "shipper")
    time.sleep(0.3)
    send_signal(child, signal.SIGKILL)
    serving.wait(lambda state: next(c for c in state.children if c.name == "shipper").restarts > child.restarts)
