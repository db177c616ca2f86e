"""What is durable on a local disk: bytes by fdatasync or fsync, names by fsync of each folder that was changed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sphere.ingest.storage.local import LocalStorage

pytestmark = pytest.mark.unit


@pytest.fixture
def synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was synced, in order, below `tmp_path`; files with the name of the call."""
    calls: list[str] = []

    def recording(name: str) -> Callable[[int], None]:
        original: Callable[[int], None] = getattr(os, name)

        def call(fd: int) -> None:
            path = Path(f"/proc/self/fd/{fd}").readlink()
            where = str(path.relative_to(tmp_path))
            calls.append(f"{where}/" if path.is_dir() else f"{name} {path.suffix}")
            original(fd)

        return call

    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, recording(name))
    return calls


def test_a_new_file_and_each_new_folder(tmp_path: Path, synced: list[str]) -> None:
    storage = LocalStorage(tmp_path / "root")
    appender = storage.create("a/b/one.tar")
    assert synced == ["./", "root/", "root/a/", "root/a/b/"]
    synced.clear()
    appender.write([b"bytes"])
    assert synced == []
    appender.sync()
    assert synced == ["fdatasync .tar"]
    storage.create("a/b/two.tar")
    assert synced[1:] == ["root/a/b/"]


def test_a_root_that_somebody_else_made(tmp_path: Path, synced: list[str]) -> None:
    """As locks of a spool are: nothing in it outlasts a crash of the host before its own name does."""
    (tmp_path / "root" / "locks").mkdir(parents=True)
    storage = LocalStorage(tmp_path / "root")
    storage.create("a/one.tar")
    assert synced == ["./", "root/", "root/a/"]
    storage.create("a/two.tar")
    assert synced[3:] == ["root/a/"]


def test_names_that_change(tmp_path: Path, synced: list[str]) -> None:
    storage = LocalStorage(tmp_path / "root")
    storage.write("a/one.json", b"1")
    assert synced[-2:] == ["fsync .sphere-tmp", "root/a/"]
    for change in (lambda: storage.rename("a/one.json", "a/two.json"), lambda: storage.delete("a/two.json")):
        synced.clear()
        change()
        assert synced == ["root/a/"]


def test_what_is_cut(tmp_path: Path, synced: list[str]) -> None:
    storage = LocalStorage(tmp_path / "root")
    storage.write("one.tar", b"123")
    synced.clear()
    storage.truncate("one.tar", 1)
    assert synced == ["fsync .tar"]
