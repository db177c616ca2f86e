"""Kills of receivers and of their supervisor under load: counted, restarted, nothing acknowledged lost."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
from pydicom.data import get_testdata_file

from sphere.archive import Archive
from sphere.conf import serving as told
from tests.support.ledger import RESUME_S, Ledger, Senders, audit
from tests.support.serving import ready, running_supervisor, send_signal

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
    ledger = Ledger()
    with running_supervisor(tmp_path, workers=2) as serving:
        children = [psutil.Process(child.pid) for child in serving.state().children]
        with Senders(ledger, serving.port, count=4):
            ledger.wait_for_success(time.monotonic())
            serving.process.kill()
            serving.process.wait()
            _wait_until_free(serving.port)
            assert not serving.state().alive()
            assert serving.state().not_ready == ["supervisor"]
            with running_supervisor(tmp_path, workers=2, port=serving.port) as again:
                ledger.wait_for_success(time.monotonic())
                _, left = psutil.wait_procs(children, timeout=30)
                assert left == []
                assert again.stop() == 0
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
            serving.wait(ready)
            ledger.wait_for_success(time.monotonic())
            print(f"\nresumed after {time.monotonic() - stopped:.1f} s")
        assert serving.stop() == 0
        assert not (serving.settings.archive.state_dir / "serve.json").exists()
    audit(ledger, serving.settings)


@pytest.mark.spark
def test_a_stop_ends_a_running_extraction_and_is_clean(tmp_path: Path) -> None:
    with running_supervisor(tmp_path, workers=1, extract_every_s=0.1) as serving:
        _, extract = serving.state().children
        archive = Archive(serving.settings)
        assert all(one.record is not None for one in archive.import_files([Path(get_testdata_file("CT_small.dcm"))]))
        deadline = time.monotonic() + 120
        while (job := told.read_job(serving.settings.archive.state_dir)) is None or not job.step:
            assert time.monotonic() < deadline, serving.log_path.read_text()[-3000:]
            time.sleep(0.01)
        assert not job.ended_at
        family = psutil.Process(extract.pid).children(recursive=True)
        assert serving.stop() == 0
        assert "extraction stopped before its end" in serving.log_path.read_text()
        assert "child killed" not in serving.log_path.read_text()
        gone, alive = psutil.wait_procs(family, timeout=30)
        assert gone and not alive, "the JVM of the extraction is left"
