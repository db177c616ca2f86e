"""Of one SOPInstanceUID one instance at a time: in a process and in several, and however a process ends."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from sphere.conf.errors import StorageError
from sphere.conf.settings import Settings
from sphere.ingest import reservations
from sphere.ingest.reservations import VERSIONS, Reservations
from tests.support.landing import land, new_member, slices

pytestmark = pytest.mark.unit

HOLDER = """
import sys
from pathlib import Path
from sphere.ingest.reservations import Reservations
with Reservations(Path(sys.argv[1])).hold("1.2.3"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_process_that_dies_lets_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reservations, "WAIT_S", 0.05)
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        ours = Reservations(tmp_path)
        with pytest.raises(StorageError, match="another instance of this UID has been under way"):
            ours.hold("1.2.3")
        with ours.hold("1.2.4"):  # of another UID nobody waits
            pass
        holder.kill()
        holder.wait()
        with ours.hold("1.2.3"):
            pass


def test_a_thread_waits_for_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Reservations(tmp_path)
    got = threading.Event()

    def wait() -> None:
        with ours.hold("1.2.3"):
            got.set()

    with ours.hold("1.2.3"):
        thread = threading.Thread(target=wait)
        thread.start()
        monkeypatch.setattr(reservations, "WAIT_S", 0.05)
        with pytest.raises(StorageError, match="send it again"):
            ours.hold("1.2.3")
        assert not got.is_set()
    thread.join(60)
    assert got.is_set() and not ours._held


def test_versions_are_seen_by_others_until_newer_ones_take_their_place(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reservations, "PLACES", 1)
    [record] = land(settings, [new_member(slices(1)[0])])
    one, two = Reservations(tmp_path), Reservations(tmp_path)
    records = [replace(record, sha256=f"{number:064x}", offset=512 * number) for number in range(VERSIONS)]
    for version in records:
        with one.hold("1.2.3") as place:
            place.add(version)
    with two.hold("1.2.3") as place:
        assert [(found.sha256, found.offset) for found in place.stored()] == [(r.sha256, r.offset) for r in records]
        assert place.stored()[0].bundle == record.bundle
        assert not place.forgotten_at
    with two.hold("1.2.4") as place:
        assert place.stored() == []
        place.add(record)
    with one.hold("1.2.3") as place:
        assert [found.sha256 for found in place.stored()] == [version.sha256 for version in records[1:]]
        assert place.forgotten_at


def test_without_room_threads_wait_for_each_other_all_the_same(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    [record] = land(settings, [new_member(slices(1)[0])])

    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(reservations.os, "posix_fallocate", full)
        patch.setattr(reservations, "WAIT_S", 0.05)
        ours = Reservations(tmp_path)
        with ours.hold("1.2.3") as place:
            place.add(record)
            with pytest.raises(StorageError, match="send it again"):
                ours.hold("1.2.3")
    assert list(tmp_path.glob("*reservations*")) == list(tmp_path.glob(".reservations*")) == []
    assert ["No space left on device" in message for message in caplog.messages] == [True]
    with ours.hold("1.2.3") as place:  # there is room again
        place.add(record)
    with Reservations(tmp_path).hold("1.2.3") as place:
        assert len(place.stored()) == 1
