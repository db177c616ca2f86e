"""Kills of receivers and of their supervisor under load: counted, restarted, nothing acknowledged lost."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil  # type: ignore[import-untyped]
import pytest
from pydicom.data import get_testdata_file

from sphere.archive import Archive
from sphere.catalog.lock import CatalogLock
from sphere.conf import serving as told
from sphere.ingest.journal import Landed
from sphere.ingest.spool import backlog
from sphere.ingest.storage import open_storage
from sphere.serve import PATIENCE_S
from tests.support.ledger import RESUME_S, Ledger, Senders, audit, begin, store
from tests.support.ports import free_port
from tests.support.raw_peer import RawPeer
from tests.support.receiver import ROOT, STOP_S
from tests.support.serving import Serving, ready, running_supervisor, send_signal

pytestmark = pytest.mark.faults

KILLS = 50


def test_receivers_are_killed_50_times_under_load(tmp_path: Path) -> None:
    ledger = Ledger()
    with running_supervisor(tmp_path, workers=2) as serving:
        with Senders(ledger, serving.port, count=4):
            for kill in range(KILLS):
                state = serving.wait(lambda state: any(child.state == "ready" for child in state.children))
                child = next(child for child in state.children if child.state == "ready")
                killed = time.monotonic()
                send_signal(child, signal.SIGKILL)
                total = kill + 1
                serving.wait(lambda state: sum(c.restarts for c in state.children) >= total)  # noqa: B023
                ledger.wait_for_success(killed)
        state = serving.wait(ready)
        assert sum(child.restarts for child in state.children) == KILLS
        assert {child.last_end for child in state.children} == {"signal 9"}
        assert serving.stop() == 0
    result = audit(ledger, serving.settings)
    assert result.acknowledged >= KILLS


def test_the_supervisor_is_killed_under_load(tmp_path: Path) -> None:
    """Started again as the guide has it, it serves new associations within 10 s of the kill."""
    ledger = Ledger()
    with running_supervisor(tmp_path, workers=2, forever=True) as serving:
        before = serving.state()
        children = [psutil.Process(child.pid) for child in before.children]
        with Senders(ledger, serving.port, count=4):
            ledger.wait_for_success(time.monotonic())
            killed = time.monotonic()
            os.kill(before.pid, signal.SIGKILL)
            serving.wait(lambda state: state.not_ready == ["supervisor"])
            serving.wait(lambda state: state.pid != before.pid and any(one.state == "ready" for one in state.children))
            peer = RawPeer.connect(serving.port)
            begin(peer)
            assert store(peer, ledger, *ledger.instance()) == 0
            resumed = time.monotonic() - killed
            peer.close()
            print(f"\nresumed {resumed:.1f} s after the kill")
            assert resumed < RESUME_S
            _, left = psutil.wait_procs(children, timeout=30)
            assert left == []
            serving.wait(ready)
            ledger.wait_for_success(time.monotonic())
        serving.stop()
    audit(ledger, serving.settings)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stop_lets_a_study_under_way_be_stored(tmp_path: Path, number: signal.Signals) -> None:
    """SIGTERM closes the port; an association in the middle of a study goes on to its end, and all is sealed. A
    terminal that is closed does the same; SIGHUP comes to the whole group."""
    ledger = Ledger()
    with running_supervisor(tmp_path, workers=2) as serving:
        peer = RawPeer.connect(serving.port)
        begin(peer)
        children = [psutil.Process(child.pid) for child in serving.state().children]
        for message_id in range(1, 21):
            uid, data = ledger.instance(largest=200_000)
            if message_id == 6:
                for child in children if number == signal.SIGHUP else ():
                    child.send_signal(number)
                serving.process.send_signal(number)
                _wait_until_free(serving.port)
            assert store(peer, ledger, uid, data, message_id=message_id) == 0
        assert serving.process.poll() is None
        peer.release()
        assert serving.process.wait(STOP_S) == 0
    storage = open_storage(serving.settings.storage.root)
    states = list(Landed(storage, serving.settings.archive.state_dir).bundles())
    assert states and all(state.sealed for state in states)
    assert sum(state.records or 0 for state in states) == 20
    audit(ledger, serving.settings)


def _wait_until_free(port: int) -> None:
    deadline = time.monotonic() + RESUME_S
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
                return
            except OSError:
                assert time.monotonic() < deadline, "the children keep the port"
        time.sleep(0.05)


def test_children_of_a_machine_that_stood_still_are_not_replaced(tmp_path: Path) -> None:
    """A container that is paused, a snapshot: all stop at once, and the supervisor may be the first to go on."""
    with running_supervisor(tmp_path, workers=2) as serving:
        family = [psutil.Process(pid) for pid in (serving.process.pid, *(one.pid for one in serving.state().children))]
        for process in family:
            process.suspend()
        time.sleep(PATIENCE_S + 1)
        family[0].resume()
        time.sleep(1.0)  # it has looked at its children, which still stand
        for process in family[1:]:
            process.resume()
        went_on = told.now()
        state = serving.wait(lambda state: all(child.last_heartbeat > went_on for child in state.children))
        assert [child.restarts for child in state.children] == [0, 0]
        assert serving.stop() == 0


def test_a_second_supervisor_is_refused(tmp_path: Path) -> None:
    """Two would write each other's state, and each answer for the other's children."""
    with running_supervisor(tmp_path, workers=1) as serving:
        command = [sys.executable, "-m", "sphere.cli", "--config", str(tmp_path / "sphere.toml"), "serve"]
        elsewhere = {**os.environ, "SPHERE_DIMSE__PORT": "0"}
        for environ in (os.environ, elsewhere):
            run = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=60)  # noqa: PLW1510
            assert run.returncode == 2
            assert f"another `sphere serve`, process {serving.process.pid}, has archive.state_dir" in run.stderr
            assert run.stderr.count("\n") == 1
        assert ready(serving.state())
        assert serving.stop() == 0


def test_a_receiver_that_does_not_answer_is_replaced(tmp_path: Path) -> None:
    ledger = Ledger()
    with running_supervisor(tmp_path, workers=1) as serving:
        with Senders(ledger, serving.port, count=2):
            ledger.wait_for_success(time.monotonic())
            [child] = serving.state().children
            loaded = {Path(one.path).parts for one in psutil.Process(child.pid).memory_maps()}
            assert not {"gdcm", "pandas", "PIL"} & {part for parts in loaded for part in parts}
            stopped = time.monotonic()
            send_signal(child, signal.SIGSTOP)
            state = serving.wait(lambda state: state.children[0].restarts == 1)
            assert (state.children[0].unanswered, state.children[0].last_end) == (1, "signal 9")
            assert state.not_ready == ["receiver-1"]
            ended = time.monotonic()
            ledger.wait_for_success(ended, within_s=RESUME_S - (ended - stopped))
            print(f"\nresumed after {time.monotonic() - stopped:.1f} s")
            serving.wait(ready)
        assert serving.stop() == 0
        assert not (serving.settings.archive.state_dir / "serve.json").exists()
    audit(ledger, serving.settings)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_other_children_are_replaced_while_receivers_go_on(tmp_path: Path, number: signal.Signals) -> None:
    """HTTP, extraction and shipping: killed, or stopped and without a heartbeat (jobs have less patience here)."""
    ledger = Ledger()
    serves = {"web": True, "extract_every_s": 3600, "ingest": {"durability": "spool", "spool_seal_s": 1}}
    with running_supervisor(tmp_path, workers=1, module="tests.support.short_serve", **serves) as serving:
        receiver, *others = serving.state().children
        assert [child.name for child in others] == ["web", "extract", "shipper"]
        with Senders(ledger, serving.port, count=2, pause_s=0.01):
            ledger.wait_for_success(time.monotonic())
            struck = time.monotonic()
            for child in others:
                send_signal(child, number)
            serving.wait(lambda state: all(child.restarts == 1 for child in state.children[1:]))
            state = serving.wait(ready)
            ledger.wait_for_success(time.monotonic())
        assert ledger.longest_gap(struck) < RESUME_S
        assert [child.last_end for child in state.children[1:]] == ["signal 9"] * 3
        assert [child.unanswered for child in state.children[1:]] == [int(number == signal.SIGSTOP)] * 3
        assert (state.children[0].pid, ledger.broken, ledger.refused) == (receiver.pid, 0, {})
        assert httpx.get(f"http://127.0.0.1:{state.web_port}/readyz", timeout=30).status_code == 200
        serving.wait(lambda state: state.spool is not None and state.spool.shipped_bundles > 0)
        assert serving.stop() == 0
    audit(ledger, serving.settings)


@pytest.mark.spark
def test_children_that_are_stopped_when_the_supervisor_dies(tmp_path: Path) -> None:
    """None is left: neither who has the port nor who ships, whose lock the next one needs."""
    ledger = Ledger()
    spooled = {"durability": "spool", "spool_seal_s": 1}
    with running_supervisor(tmp_path, workers=1, ingest=spooled, forever=True) as serving:
        before = serving.state()
        children = [psutil.Process(child.pid) for child in before.children]
        with Senders(ledger, serving.port, count=2):
            ledger.wait_for_count(20)
            for child in before.children:
                send_signal(child, signal.SIGSTOP)
            os.kill(before.pid, signal.SIGKILL)
            gone, left = psutil.wait_procs(children, timeout=40)
            assert (len(gone), left) == (2, [])
            serving.wait(lambda state: state.pid != before.pid and ready(state))
            ledger.wait_for_success(time.monotonic())
        state = serving.wait(lambda state: ready(state) and not backlog(serving.settings).bundles)
        assert [child.restarts for child in state.children] == [0, 0]
        serving.stop()
    audit(ledger, serving.settings)


@pytest.mark.parametrize("after_s", [0.0, 0.3, 0.8, 1.8])
def test_sigterm_while_it_starts(tmp_path: Path, after_s: float) -> None:
    """Status 0 and nobody left, wherever the start is: from when SIGTERM is no longer left to the system on."""
    config = tmp_path / "sphere.toml"
    config.write_text(f"[dimse]\nport = {free_port()}\n[web]\nport = 0\n")
    command = [sys.executable, "-m", "sphere.cli", "--config", str(config), "serve"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    until = time.monotonic() + STOP_S
    while not _catches(process.pid, signal.SIGTERM):
        assert time.monotonic() < until
        time.sleep(0.005)
    time.sleep(after_s)
    children = psutil.Process(process.pid).children(recursive=True)
    print(f"\n{len(children)} children")
    process.terminate()
    assert process.wait(STOP_S) == 0, (tmp_path / "log").read_text()
    assert psutil.wait_procs(children, timeout=5)[1] == []
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_sigterm_in_a_finalizer() -> None:
    """Where an exception would be told and passed over, as happens while modules are imported."""
    body = (
        "import os, signal, weakref; from sphere.serve import leave_at_sigterm; leave_at_sigterm(); one = {0}\n"
        "weak = weakref.ref(one, lambda _: os.kill(os.getpid(), signal.SIGTERM)); del one; print('goes on')"
    )
    command = [sys.executable, "-c", body]
    run = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=STOP_S)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def _catches(pid: int, number: int) -> bool:
    """Whether a process has a handler of its own for a signal (proc(5))."""
    [caught] = re.findall(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(caught, 16) >> (number - 1) & 1)


def test_an_extraction_is_killed_and_a_later_one_stopped(tmp_path: Path) -> None:
    """kill -9 in a step: the next child does it all. SIGTERM in one: it ends there, and is clean."""
    with running_supervisor(tmp_path, workers=1, extract_every_s=0.1) as serving:
        archive = Archive(serving.settings)
        _import(archive, "CT_small.dcm")
        killed = _family_of_running_extraction(serving)
        began_at = _job(serving).began_at
        send_signal(serving.state().children[1], signal.SIGKILL)
        serving.wait(lambda _: _job(serving).began_at > began_at and bool(_job(serving).ended_at), within_s=120)
        assert serving.state().children[1].restarts == 1
        assert [len(list(archive.find(level))) for level in ("STUDY", "IMAGE")] == [1, 1]
        began_at = _job(serving).began_at
        with CatalogLock(serving.settings, job="test"):  # so that it is not over before it is stopped
            _import(archive, "MR_small.dcm")
            family = _family_of_running_extraction(serving, after=began_at)
            assert serving.stop() == 0
        assert "extraction stopped before its end" in serving.log_path.read_text()
        assert "child killed" not in serving.log_path.read_text()
        gone, alive = psutil.wait_procs(killed + family, timeout=30)
        assert len(gone) >= 2 and not alive, "the JVM of an extraction is left"


def _import(archive: Archive, name: str) -> None:
    assert all(one.record is not None for one in archive.import_files([Path(get_testdata_file(name))]))


def _job(serving: Serving) -> told.JobState:
    job = told.read_job(serving.settings.archive.state_dir)
    assert job is not None
    return job


def _family_of_running_extraction(serving: Serving, *, after: str = "") -> list[psutil.Process]:
    """The processes below the extraction's once it is in a step of a run that began later than `after`."""
    deadline = time.monotonic() + 120
    while True:
        job = told.read_job(serving.settings.archive.state_dir)
        if job is not None and job.began_at > after and job.step:
            break
        assert time.monotonic() < deadline, serving.log_path.read_text()[-3000:]
        time.sleep(0.01)
    assert not job.ended_at
    return psutil.Process(serving.state().children[1].pid).children(recursive=True)
