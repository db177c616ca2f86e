"""`sphere serve` reads sealed bundles back: bytes that changed on the disk after sealing are found and told."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import httpx
import psutil
import pytest
from click.testing import CliRunner

from sphere.cli import main
from sphere.conf import serving as told
from sphere.conf.serving import VerifyState
from sphere.ingest.storage import open_storage
from tests.support.landing import land, new_member, slices
from tests.support.serving import Serving, running_supervisor, send_signal

pytestmark = pytest.mark.faults


def verified(serving: Serving, *, good: int, damaged: int) -> VerifyState:
    """What is told, once so many bundles were read back."""
    deadline = time.monotonic() + 60
    while True:
        state = told.read_verify(serving.settings.archive.state_dir)
        if state is not None and (state.bundles, state.damaged, state.waiting) == (good, damaged, 0):
            return state
        assert time.monotonic() < deadline, (state, serving.log_path.read_text()[-3000:])
        time.sleep(0.05)


def test_bytes_that_changed_after_sealing(tmp_path: Path) -> None:
    with running_supervisor(tmp_path, workers=1, web=True, ingest={"verify_sealed": True}) as serving:
        receiver, web, child = serving.state().children
        assert (receiver.name, web.name, child.name) == ("receiver-1", "web", "verifier")
        assert psutil.Process(child.pid).nice() == 19
        send_signal(child, signal.SIGSTOP)
        land(serving.settings, [new_member(one) for one in slices(3, seed=1)])
        record = land(serving.settings, [new_member(one) for one in slices(2, seed=2)])[1]
        path = tmp_path / "storage" / record.bundle
        data = bytearray(path.read_bytes())
        data[record.offset + record.length - 1] ^= 0x80  # of the pixels
        path.write_bytes(data)
        send_signal(child, signal.SIGCONT)
        state = verified(serving, good=1, damaged=1)
        assert state.named == (f"{record.bundle}: member at byte {record.offset}: sha256 differs",)

        root = f"http://127.0.0.1:{serving.state().web_port}"
        ready = httpx.get(f"{root}/readyz", timeout=30)
        assert (ready.status_code, ready.json()) == (200, {"status": "ready", "not_ready": [], "damaged_bundles": 1})
        metrics = httpx.get(f"{root}/metrics", timeout=30).text
        assert 'sphere_sealed_bundles{found="good"} 1.0' in metrics
        assert 'sphere_sealed_bundles{found="damaged"} 1.0' in metrics
        assert httpx.get(f"{root}/status", timeout=30).json()["damaged"] == 1
        assert httpx.get(f"{root}/status/storage", timeout=30).json()["verified"]["named"] == list(state.named)
        shown = CliRunner().invoke(main, ["--config", str(tmp_path / "sphere.toml"), "status"]).output
        assert f"1 DAMAGED and kept\n            {state.named[0]}" in shown

        send_signal(serving.state().children[2], signal.SIGKILL)
        serving.wait(lambda state: state.children[2].restarts == 1 and state.children[2].state == "ready")
        land(serving.settings, [new_member(one) for one in slices(1, seed=3)])
        assert verified(serving, good=2, damaged=1).named == state.named
        assert serving.stop() == 0
    assert path.read_bytes() == data, "it is kept as it was found"
    assert open_storage(serving.settings.storage.root).size(record.bundle) == len(data)
