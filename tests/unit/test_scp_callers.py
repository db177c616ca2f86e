"""Places and rates that several processes share."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sphere.conf.loading import from_dict
from sphere.conf.peers import Strangers
from sphere.scp import callers
from sphere.scp.callers import BURST_S, FORGOTTEN_S, Caller, Slot, limits_of, spend, take_slot

pytestmark = pytest.mark.unit

HOLD = """
import sys, time
from pathlib import Path
from sphere.scp.callers import take_slot
slot = take_slot(Path(sys.argv[1]), "a", 2)
print(slot is not None, flush=True)
time.sleep(60)
"""


def test_slots_come_back_from_a_killed_process(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True\n"
    mine = take_slot(tmp_path, "a", 2)
    assert mine is not None
    assert take_slot(tmp_path, "a", 2) is None
    assert take_slot(tmp_path, "b", 1) is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert take_slot(tmp_path, "a", 2) is not None
    mine.release()
    mine.release()


def test_no_limit_takes_no_place(tmp_path: Path) -> None:
    slots = [take_slot(tmp_path, "a", 0) for _ in range(5)]
    assert None not in slots
    assert list(tmp_path.iterdir()) == []


def test_a_rate_owes_a_second_and_then_waits(tmp_path: Path) -> None:
    now = 100.0
    path = tmp_path / "rate"
    waits = [spend(path, (0.25, 0.0), clock=lambda: now) for _ in range(6)]
    assert waits == pytest.approx([0, 0, 0, 0, 0.25, 0.5])
    now += 0.5 + BURST_S
    assert spend(path, (0.0, 1.5), clock=lambda: now) == pytest.approx(0.5)
    now = 3.0  # the host was booted
    path.write_bytes(path.read_bytes())
    assert spend(path, (0.25, 0.0), clock=lambda: now) <= FORGOTTEN_S
    now = 100.0 - 2 * FORGOTTEN_S
    assert spend(path, (0.25, 0.0), clock=lambda: now) == 0.0


@pytest.mark.parametrize(
    ("rights", "idle_s", "message_s"),
    [
        ({}, 300, 60),
        ({"idle_s": 5}, 5, 5),
        ({"dimse_timeout_s": 7}, 300, 7),
        ({"idle_s": 9, "dimse_timeout_s": 7}, 9, 7),
    ],
)
def test_time_limits_of_a_caller(tmp_path: Path, rights: dict[str, float], idle_s: float, message_s: float) -> None:
    limits = limits_of(Strangers(**rights), from_dict({}, base=tmp_path))
    assert (limits.idle_s, limits.message_s) == (idle_s, message_s)


def test_a_full_disk_costs_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What was stored is answered, and nobody is refused for a place that could not be counted."""

    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    rights = Strangers(max_instances_s=1.0)
    caller = Caller("strangers", rights, limits_of(rights, from_dict({}, base=tmp_path)), tmp_path, Slot())
    assert [caller.delay(1) > 0 for _ in range(3)] == [False, True, True]
    monkeypatch.setattr(callers.os, "pwrite", full)
    assert caller.delay(1) == 0
    monkeypatch.setattr(callers.os, "open", full)
    slot = take_slot(tmp_path, "a", 1)
    assert slot is not None
    slot.release()
    assert [message.split(":")[0] for message in caplog.messages] == [
        "rate of strangers is not held",
        "a is not counted",
    ]
