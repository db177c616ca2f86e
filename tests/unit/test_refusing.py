"""A receiver whose storage takes nothing says so, and when it takes something again, whether anything comes or not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sphere.conf.errors import StorageFull
from sphere.conf.loading import from_dict
from sphere.ingest.bundle import BundleWriter, NewMember
from sphere.ingest.records import MemberRecord
from sphere.ingest.spool import SpoolWriter
from sphere.ingest.storage import open_storage
from sphere.scp import refusing
from sphere.scp.refusing import ToldWriter
from tests.support.bundles import new_member

pytestmark = pytest.mark.unit


class Disk:
    """Refuses while it is `full`."""

    full = False
    tries = 0

    def store(self, member: NewMember) -> MemberRecord:
        self._ask()
        return None  # type: ignore[return-value]

    def check(self) -> None:
        self.tries += 1
        self._ask()

    def _ask(self) -> None:
        if self.full:
            raise StorageFull("no room")


def wait(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def refused(writer: ToldWriter) -> None:
    with pytest.raises(StorageFull, match="no room"):
        writer.store(new_member())


def test_it_is_told_once_and_tried_until_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusing, "TRY_S", 0.01)
    disk, told = Disk(), list[bool]()
    writer = ToldWriter(disk, told.append)
    writer.store(new_member())
    assert (told, disk.tries) == ([], 0)
    disk.full = True
    for _ in range(3):
        refused(writer)
    wait(lambda: disk.tries >= 3)
    assert told == [True]
    disk.full = False
    wait(lambda: told == [True, False])
    tries = disk.tries
    time.sleep(0.1)
    assert disk.tries == tries


def test_no_room_for_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is told that nothing can be stored sends nothing: the next refusal has it tried all the same."""
    monkeypatch.setattr(refusing, "TRY_S", 0.01)
    disk, told, start = Disk(), list[bool](), threading.Thread.start

    def full(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    writer = ToldWriter(disk, told.append)
    disk.full = True
    monkeypatch.setattr(threading.Thread, "start", full)
    refused(writer)
    monkeypatch.setattr(threading.Thread, "start", start)
    refused(writer)
    disk.full = False
    wait(lambda: told == [True, False])


def test_a_success_says_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    disk, told = Disk(), list[bool]()
    writer = ToldWriter(disk, told.append)
    for full in (True, False, True, False):
        disk.full = full
        if full:
            refused(writer)
        else:
            writer.store(new_member())
    assert told == [True, False, True, False]


def test_a_check_leaves_nothing_behind(tmp_path: Path) -> None:
    settings = from_dict({"ingest": {"durability": "spool", "spool_limit_mib": 1}}, base=tmp_path)
    storage = open_storage(settings.storage.root)
    writer = BundleWriter(storage, settings)
    writer.check()
    writer.close()
    assert [path for path in (tmp_path / "storage").rglob("*") if path.is_file()] == []
    spool = SpoolWriter(settings)
    spool.check()
    spool.store(new_member(1, b"z" * 600_000))
    with pytest.raises(StorageFull, match="spool_limit_mib"):
        spool.store(new_member(2, b"z" * 600_000))
    spool.check()
    spool.close()
