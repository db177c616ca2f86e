"""What /readyz says of the storage: it is named while it is away, nobody waits for it long, and it is asked seldom."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sphere.conf import serving
from sphere.conf.errors import StorageError
from sphere.conf.loading import from_dict
from sphere.scp.web import probe
from sphere.scp.web.probe import Probe
from tests.support.web import Web, serving_web

pytestmark = pytest.mark.unit

READY = 200, {"status": "ready", "not_ready": []}


@pytest.fixture(autouse=True)
def always_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "KEPT_S", 0.0)


@pytest.fixture(params=["storage", "spool"])
def web(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Web]:
    """HTTP on an archive of either durability."""
    settings = from_dict({"ingest": {"durability": request.param}}, base=tmp_path)
    with serving_web(settings) as running:
        yield running


def readyz(web: Web) -> tuple[int, dict[str, Any]]:
    """What it says while the supervisor and all children serve."""
    serving.write(web.settings.archive.state_dir, pid=os.getpid(), port=104, stopping=False, children=())
    answer = web.client.get(web.url.replace("/dicom-web", "/readyz"))
    return answer.status_code, answer.json()


@pytest.mark.parametrize("replaced", [False, True])
def test_a_root_that_is_gone(web: Web, tmp_path: Path, replaced: bool) -> None:
    """It is not ready, and not made anew; with a spool in front of it receiving goes on, and it is only named."""
    root, elsewhere = tmp_path / "storage", tmp_path / "elsewhere"
    _until(lambda: readyz(web) == READY and root.is_dir() and not _looking())
    root.rename(elsewhere)
    if replaced:
        root.touch()
    away = 503, {"status": "not ready", "not_ready": ["storage"]}
    if web.settings.ingest.durability == "spool":
        away = 200, {**READY[1], "away": ["storage"]}
    _until(lambda: readyz(web) == away)
    assert root.exists() == replaced
    root.unlink(missing_ok=True)
    elsewhere.rename(root)
    _until(lambda: readyz(web) == READY)
    _until(lambda: not list(root.iterdir()))


@pytest.mark.parametrize("web", ["spool"], indirect=True)
def test_a_spool_that_is_gone(web: Web, tmp_path: Path) -> None:
    assert readyz(web) == READY
    (tmp_path / "spool").rename(tmp_path / "elsewhere")
    (tmp_path / "spool").touch()
    assert readyz(web) == (503, {"status": "not ready", "not_ready": ["spool"]})


def _looking() -> bool:
    return any(thread.name.startswith("probe-") for thread in threading.enumerate())


def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Asked:
    """A storage that answers when told to."""

    def __init__(self) -> None:
        self.times = 0
        self.answers = threading.Event()
        self.error: StorageError | None = None

    def __call__(self) -> None:
        self.times += 1
        self.answers.wait()
        if self.error is not None:
            raise self.error


def test_answers_are_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "KEPT_S", 60.0)
    asked = Asked()
    asked.answers.set()
    one = Probe("storage", asked)
    assert [one.away() for _ in range(100)] == [False] * 100
    assert asked.times == 1


def test_nobody_waits_for_one_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is away after WAIT_S; one look is under way, however many ask; when it answers, it is back."""
    monkeypatch.setattr(probe, "WAIT_S", 0.05)
    asked = Asked()
    one = Probe("storage", asked)
    assert not one.away(wait=False)  # nothing is known yet
    assert [one.away() for _ in range(50)] == [True] * 50
    assert one.away(wait=False)
    assert asked.times == 1
    asked.answers.set()
    _until(lambda: not one.away())
    asked.error = StorageError("read-only")
    _until(one.away)


def test_one_that_never_answers_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look that hangs for ever does not keep the next one from finding the storage; few are left behind."""
    monkeypatch.setattr(probe, "WAIT_S", 0.0)
    monkeypatch.setattr(probe, "STUCK_S", 0.02)
    hung, asked = Asked(), Asked()
    asked.answers.set()
    looks = [hung, hung, hung]

    def look() -> None:
        (looks.pop() if looks else asked)()

    one = Probe("storage", look)
    _until(lambda: one.away() and not looks and asked.times > 0)
    monkeypatch.setattr(probe, "WAIT_S", 5.0)
    assert not one.away()
    assert hung.times == 3
    hung.error = StorageError("an answer that nobody waits for any more")
    hung.answers.set()
    assert not one.away()
