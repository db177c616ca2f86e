"""Who writes the catalog: one at a time, named to the others, whatever became of the one before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from sphere.catalog import lock as lock_module
from sphere.catalog.lock import LOCK_PATH, CatalogLock, Owner, _FileGuard
from sphere.conf.errors import LockHeld
from sphere.conf.settings import Settings
from sphere.ingest.storage import Storage, open_storage
from tests.support.catalog import archive

pytestmark = pytest.mark.unit

HOLDER = """
import sys, time
from pathlib import Path
from sphere.catalog.lock import CatalogLock
from tests.support.catalog import archive
with CatalogLock(archive(Path(sys.argv[1])), job="extract"):
    print("held", flush=True)
    time.sleep(600)
"""


def patient(folder: Path, seconds: float) -> Settings:
    settings = archive(folder)
    return settings.model_copy(update={"extract": settings.extract.model_copy(update={"lock_wait_s": seconds})})


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of the archive in `tmp_path`."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_second_is_told_who_holds_it(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    said = rf"being written by extract \(process {holder.pid} on .+, since 20.+\+00:00\)"
    with pytest.raises(LockHeld, match=said), CatalogLock(patient(tmp_path, 0), job="compact"):
        pass


def test_a_killed_holder_leaves_nothing_behind(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with CatalogLock(archive(tmp_path)) as lock:
        lock.check()


def test_waiting_until_it_is_free(tmp_path: Path) -> None:
    order: list[str] = []
    held = threading.Event()

    def first() -> None:
        with CatalogLock(archive(tmp_path)):
            held.set()
            time.sleep(0.3)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    held.wait()
    with CatalogLock(patient(tmp_path, 60)):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]


def test_taken_again_after_use(tmp_path: Path) -> None:
    taken = 0
    for _ in range(2):
        with CatalogLock(archive(tmp_path)) as lock:
            lock.check()
            taken += 1
    assert taken == 2


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """A storage without flock, as far as the lock file is concerned."""
    return open_storage(tmp_path.as_uri())


def dead(**changes: object) -> Owner:
    """An owner on another host whose heartbeat stopped long ago."""
    ago = (datetime.now(timezone.utc) - timedelta(hours=1)).isoformat()
    return replace(Owner.here("extract"), host="elsewhere", heartbeat=ago, **changes)  # type: ignore[arg-type]


def test_lock_file_is_held_and_released(storage: Storage) -> None:
    one, two = _FileGuard(storage), _FileGuard(storage)
    mine, other = Owner.here("extract"), Owner.here("compact")
    assert one.take(mine)
    assert not two.take(other)
    assert two.holder() == mine
    one.release(mine)
    assert two.take(other)
    two.release(other)
    assert list(storage.walk()) == []


def gone_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    ("owner", "gone"),
    [
        (dead, True),
        (lambda: replace(dead(), heartbeat=datetime.now(timezone.utc).isoformat()), False),
        (lambda: replace(Owner.here("extract"), pid=gone_pid()), True),
        (lambda: replace(Owner.here("extract"), pid=os.getppid()), False),
    ],
)
def test_only_a_dead_owner_is_succeeded(storage: Storage, owner: Callable[[], Owner], gone: bool) -> None:
    storage.write(LOCK_PATH, owner().to_json())
    guard, mine = _FileGuard(storage), Owner.here("extract")
    assert guard.take(mine) is gone
    if gone:
        guard.release(mine)
        assert list(storage.walk()) == []


def test_a_lock_file_that_was_never_written(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write(LOCK_PATH, b"")
    guard, mine = _FileGuard(storage), Owner.here("extract")
    assert not guard.take(mine), "its creator may be about to write it"
    monkeypatch.setattr(lock_module, "STALE_S", -1.0)
    assert guard.take(mine)
    guard.release(mine)


def test_one_of_many_succeeds_a_dead_owner(storage: Storage) -> None:
    storage.write(LOCK_PATH, dead().to_json())
    guards = [(_FileGuard(storage), Owner.here(f"job {number}")) for number in range(8)]
    start, taken = threading.Barrier(len(guards)), []

    def contend(guard: _FileGuard, owner: Owner) -> None:
        start.wait()
        if guard.take(owner):
            taken.append((guard, owner))

    threads = [threading.Thread(target=contend, args=pair) for pair in guards]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1
    guard, owner = taken[0]
    assert guard.holder() == owner
    guard.release(owner)


def test_heartbeat_is_renewed(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "HEARTBEAT_S", 0.01)
    guard, mine = _FileGuard(storage), replace(Owner.here("extract"), heartbeat="2024-01-01T00:00:00+00:00")
    assert guard.take(mine)
    while (holder := guard.holder()) is None or holder.heartbeat == mine.heartbeat:
        time.sleep(0.01)
    guard.release(mine)
    assert guard.holder() is None


def test_release_leaves_a_successor_alone(storage: Storage) -> None:
    guard, mine, successor = _FileGuard(storage), Owner.here("extract"), Owner.here("compact")
    assert guard.take(mine)
    storage.write(LOCK_PATH, successor.to_json())
    guard.release(mine)
    assert guard.holder() == successor


def test_check_tells_a_lost_lock(tmp_path: Path) -> None:
    with CatalogLock(archive(tmp_path)) as lock:
        lock.check()
        path = Path(archive(tmp_path).catalog_root.removeprefix("file://")) / lock_module.FLOCK_NAME
        path.write_bytes(Owner.here("compact").to_json())
        with pytest.raises(LockHeld, match="was lost; the catalog is being written by compact"):
            lock.check()
