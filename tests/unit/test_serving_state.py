"""What `sphere serve` says of itself, and the books that the fault tests keep."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sphere.conf import serving
from sphere.conf.settings import Settings
from sphere.ingest.bundle import BundleWriter
from sphere.ingest.storage import open_storage
from sphere.serve import DESCRIPTORS
from sphere.status import take
from tests.support.bundles import new_member
from tests.support.ledger import Ledger, audit

pytestmark = pytest.mark.unit


def child(**values: Any) -> serving.ChildState:
    fields: dict[str, Any] = {
        "name": "receiver-1", "state": "ready", "pid": 7, "restarts": 3, "unanswered": 1,
        "last_heartbeat": serving.now(), "last_end": "signal 9",
    }  # fmt: skip
    return serving.ChildState(**(fields | values))


def test_children_have_as_many_descriptors_as_they_may() -> None:
    """The soft limit becomes the hard one, where that is not more than a server needs, and is never lowered."""
    program = (
        "import resource, sys; from sphere.serve import raise_descriptors; limits = int(sys.argv[1]), int(sys.argv[2]);"
        "resource.setrlimit(resource.RLIMIT_NOFILE, limits); raise_descriptors();"
        "print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    for soft, most in ((256, 512), (512, 512), (256, hard)):
        run = subprocess.run(
            [sys.executable, "-c", program, str(soft), str(most)], capture_output=True, text=True, check=True
        )
        raised = most if 0 <= most < DESCRIPTORS else DESCRIPTORS
        assert run.stdout.split() == [str(raised), str(most)]


def test_the_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert serving.read(tmp_path) is None
    children = (child(), child(name="extract", state="waiting"))
    serving.write(tmp_path / "state", pid=os.getpid(), port=11112, stopping=False, children=children)
    state = serving.read(tmp_path / "state")
    assert state is not None
    assert state.children == children
    assert state.alive()
    assert state.not_ready == ["extract"]
    assert "receiver-1 ready pid 7, 3 restarts, last end: signal 9" in str(state)
    serving.remove(tmp_path / "state")
    assert serving.read(tmp_path / "state") is None


@pytest.mark.parametrize(
    ("pid", "written_at", "stopping"),
    [
        (os.getpid(), "2026-01-01T00:00:00.000+00:00", False),  # it no longer writes
        (2**22 + 1, serving.now(), False),  # there is no such process
        (os.getpid(), serving.now(), True),
    ],
    ids=["silent", "gone", "stopping"],
)
def test_a_supervisor_that_does_not_serve(pid: int, written_at: str, stopping: bool) -> None:
    assert serving.ServeState(pid, 104, written_at, stopping, (child(),)).not_ready == ["supervisor"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": 1}', b'{"children": [{"nonsense": 1}]}'])
def test_a_state_file_of_something_else_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / serving.FILE).write_bytes(content)
    assert serving.read(tmp_path) is None


def test_status_shows_what_serves(settings: Settings) -> None:
    assert take(settings).serving is None
    assert str(take(settings)).endswith("serving     no")
    serving.write(settings.archive.state_dir, pid=os.getpid(), port=104, stopping=False, children=[child()])
    status = take(settings)
    assert status.serving is not None
    assert '"restarts": 3' in status.to_json()
    assert "DIMSE port 104, 3 restarts" in str(status)


@pytest.mark.parametrize(
    ("fault", "message"),
    [("lost", "lost=1 duplicated=0"), ("twice", "lost=0 duplicated=1"), ("altered", "altered=1")],
)
def test_the_audit_notices(settings: Settings, fault: str, message: str) -> None:
    ledger = Ledger()
    writer = BundleWriter(open_storage(settings.storage.root), settings)
    for number in range(4):
        uid, data = ledger.instance()
        ledger.acknowledged[uid] = 0.0
        if number < 3 or fault != "lost":
            stored = data + b"!" if fault == "altered" and number == 3 else data
            writer.store(new_member(SOPInstanceUID=uid, dataset=stored))
        if number == 3 and fault == "twice":
            writer.store(new_member(SOPInstanceUID=uid, dataset=data))
    writer.close()
    with pytest.raises(AssertionError, match=message):
        audit(ledger, settings)
