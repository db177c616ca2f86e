"""What a disk may have of the files of a folder when it loses its power: all that was synced, and any of the rest."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

BLOCK = 512  # bytes that a disk writes whole


@dataclass(frozen=True)
class Change:
    """One to a file: `data` that came to byte `at`, its end at that byte, or a sync."""

    path: Path
    kind: str
    at: int = 0
    data: bytes = b""

    def apply(self, content: bytearray) -> None:
        if self.kind == "write":
            content.extend(bytes(max(0, self.at - len(content))))
            content[self.at : self.at + len(self.data)] = self.data
        elif self.kind == "room":
            content.extend(bytes(max(0, self.at - len(content))))
        elif self.kind == "cut":
            del content[self.at :]


class Recorder:
    """Notes what is done to the files below `root`, in order; `lock` is held meanwhile."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.changes: list[Change] = []
        self.lock = threading.RLock()
        self._root = root
        pwrite, writev, write = os.pwrite, os.writev, os.write
        sync, cut, room = os.fdatasync, os.ftruncate, os.posix_fallocate

        def recorded_pwrite(fd: int, data: Any, offset: int) -> int:
            with self.lock:
                done = pwrite(fd, data, offset)
                self._note(fd, "write", offset, bytes(data[:done]))
                return done

        def recorded_writev(fd: int, buffers: Sequence[Any]) -> int:
            with self.lock:
                at, done = os.fstat(fd).st_size, writev(fd, buffers)
                self._note(fd, "write", at, b"".join(buffers)[:done])
                return done

        def recorded_write(fd: int, data: bytes) -> int:
            with self.lock:
                at, done = os.fstat(fd).st_size, write(fd, data)
                self._note(fd, "write", at, data[:done])
                return done

        def recorded_sync(fd: int) -> None:
            with self.lock:
                sync(fd)
                self._note(fd, "sync")

        def recorded_cut(fd: int, size: int) -> None:
            with self.lock:
                cut(fd, size)
                self._note(fd, "cut", size)

        def recorded_room(fd: int, offset: int, size: int) -> None:
            with self.lock:
                room(fd, offset, size)
                self._note(fd, "room", offset + size)

        for name, function in (
            ("pwrite", recorded_pwrite), ("writev", recorded_writev), ("write", recorded_write),
            ("fdatasync", recorded_sync), ("ftruncate", recorded_cut), ("posix_fallocate", recorded_room),
        ):  # fmt: skip
            patch.setattr(os, name, function)

    def _note(self, fd: int, kind: str, at: int = 0, data: bytes = b"") -> None:
        path = Path(f"/proc/self/fd/{fd}").readlink()
        if path.is_relative_to(self._root):
            self.changes.append(Change(path.relative_to(self._root), kind, at, data))

    def leave(self, folder: Path, count: int, rng: random.Random) -> None:
        """Make the files as a disk may have them that lost its power after the first `count` changes."""
        lost = rng.choice([0.0, 0.05, 0.5, 1.0])  # of blocks that were not synced; 0: a piece of each write
        for path in {change.path for change in self.changes[:count]}:
            mine = [change for change in self.changes[:count] if change.path == path]
            synced = max((at for at, change in enumerate(mine) if change.kind == "sync"), default=-1) + 1
            content = bytearray()
            for change in mine[:synced]:
                change.apply(content)
            for change in mine[synced:]:
                for part in _blocks(change, rng, lost):
                    part.apply(content)
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)


def _blocks(change: Change, rng: random.Random, lost: float) -> list[Change]:
    """What came to the disk of a change that was not synced."""
    if change.kind != "write":
        return [change] * (rng.random() >= lost)
    gone = rng.randrange(len(change.data) + 1)
    hole = range(gone, gone + rng.choice([0, BLOCK, 40_000]))
    parts = range(0, len(change.data), BLOCK)
    kept = [at for at in parts if (rng.random() >= lost if lost else at not in hole)]
    return [Change(change.path, "write", change.at + at, change.data[at : at + BLOCK]) for at in kept]
