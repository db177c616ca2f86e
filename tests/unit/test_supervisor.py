"""The supervisor of `sphere serve`: when it starts a child again."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest

from sphere.conf.loading import from_dict
from sphere.conf.settings import Settings
from sphere.serve import RESTART_PAUSE_S, Child, Supervisor, _job

pytestmark = pytest.mark.unit


def nothing(settings: Settings, ready: Callable[[int], None]) -> None:
    """A child that is ready, and ends at once."""
    ready(0)


@pytest.fixture
def supervisor(tmp_path: Path) -> Supervisor:
    return Supervisor(from_dict({}, base=tmp_path))


def test_a_process_that_cannot_be_made_is_tried_again(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: SpawnProcess) -> None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    child = Child("receiver-1", nothing)
    with monkeypatch.context() as patch:
        patch.setattr(SpawnProcess, "start", start)
        pauses = []
        for _ in range(8):
            supervisor._start(child)
            assert (child.state, child.process, child.restarts) == ("waiting", None, 0)
            pauses.append(child.pause)
    assert pauses[:3] == [0.4, 0.8, 1.6]
    assert pauses[-1] == RESTART_PAUSE_S[1]
    assert child.told().pid == 0
    supervisor._start(child)
    assert child.state == "starting"
    end(supervisor, child)


def test_a_job_that_ends_at_once_is_started_ever_more_rarely(supervisor: Supervisor) -> None:
    """It says that it is ready before it has done anything."""
    job, receiver = _job("verifier", nothing), Child("receiver-1", nothing)
    for child, pauses in ((job, [0.4, 0.8]), (receiver, [0.2, 0.2])):
        for pause in pauses:
            supervisor._start(child)
            end(supervisor, child)
            assert child.pause == pause


def end(supervisor: Supervisor, child: Child) -> None:
    """See a child to its end."""
    assert child.process is not None
    child.process.join()
    supervisor._listen(child)
    supervisor._check(child)
    assert (child.state, child.last_end) == ("waiting", "status 0")
