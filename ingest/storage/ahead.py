"""Zeros behind the end of a file, written before bytes come there.

What is put over them changes nothing of the file but its bytes: a sync has no journal of the file system to wait for.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading

ALIGN = 4096  # bytes at which zeros end: blocks of file systems
STEP = 1 << 20  # bytes of zeros written at once
MOST = 32 << 20  # bytes of zeros behind the end of a file
LONE = 1 << 17  # bytes a write, on average, up to which waiting for the disk costs more than writing everything twice
FEW = 4  # small writes since the last look from which on they are a burst, and zeros are worth not waiting for
FREE = 4 << 30  # bytes that a file system with zeros ahead has room for: they are never what fills it
_CANNOT = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class ZerosAhead:
    """The zeros of one file that one thread writes to; `add` is for another one.

    Bytes may be put before `end` at any time. `moving` is held by who moves `end`, which is the end of the file.
    """

    def __init__(self, path: str, end: int) -> None:
        self.end = end
        self.moving = threading.Lock()
        self._path = path
        self._flag = getattr(os, "O_DIRECT", 0)  # not on every platform; without it there are no zeros
        self._fd = -1
        self._writes = self._bytes = 0  # since `add` looked
        self._wanted = 0  # bytes of zeros that it wanted
        self._adding = False
        self._room = True  # the last time that was looked at

    def none(self, size: int) -> bool:
        """Whether there are none after the `size` bytes of the file, and never will be."""
        return not self._flag and not self._adding and self.end <= size

    def note(self, size: int) -> None:
        """Say that `size` bytes were written which could go over zeros."""
        self._writes += 1
        self._bytes += size

    def short(self, size: int) -> bool:
        """Whether small writes come faster than `add` looks, and zeros after the `size` bytes of the file run out."""
        return (
            self._writes >= FEW
            and self._bytes <= self._writes * LONE
            and self.end - size < max(self._bytes, self._wanted // 2)
            and bool(self._flag and self._room)
            and not self._adding
        )

    def drop(self, fd: int, size: int) -> None:
        """End the file after `size` bytes, for what cannot go over zeros: it gets no more of them. Raises OSError."""
        self._flag = 0
        self.cut(fd, size)

    def cut(self, fd: int, size: int) -> None:
        """End the file after `size` bytes; raises OSError."""
        if self.end > size:
            _check_size(fd, size)
            os.ftruncate(fd, size)
            self.end = size

    def add(self, size: int) -> None:
        """Have zeros after the `size` bytes of the file for twice what came since the last call, if that came in small
        writes, and twice as many as before where they are `short`. Raises OSError where the disk fails; no room is no
        error."""
        self._wanted = 2 * max(self._bytes, self._wanted if self.short(size) else 0)
        writes, came = self._writes, self._bytes
        self._writes = self._bytes = 0
        if self._flag and 0 < came <= writes * LONE:
            self._wanted = min(self._wanted, MOST)
            self._adding = True
            try:
                self._fill(size + self._wanted)
            except OSError as error:
                if error.errno not in _CANNOT:
                    raise
                self._flag = 0
            finally:
                self._adding = False

    def close(self) -> None:
        """Let go."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _fill(self, until: int) -> None:
        if self.end >= until:
            return
        if self._fd < 0:  # of its own: an error that is told here is told to who syncs the file as well
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC | self._flag)
        room = os.fstatvfs(self._fd)
        self._room = room.f_bavail * room.f_frsize >= FREE
        if not self._room:
            return
        zeros = memoryview(mmap.mmap(-1, STEP))  # begins at a page, as O_DIRECT wants it
        while self.end < until and self._flag:
            with self.moving:
                if self._flag:
                    self._step(zeros)
        os.fdatasync(self._fd)

    def _step(self, zeros: memoryview) -> None:
        """One piece; room is taken first, as the kernel lets writes within a file go on beside each other."""
        size = STEP - self.end % ALIGN
        _check_size(self._fd, self.end)
        try:
            os.posix_fallocate(self._fd, self.end, size)
            os.pwrite(self._fd, zeros[:size], self.end)
        finally:
            self.end = max(self.end, os.fstat(self._fd).st_size)


def _check_size(fd: int, least: int) -> None:
    """Raise OSError where somebody has cut the file: zeros would stand in the place of what it lost, as if it were
    there."""
    if os.fstat(fd).st_size < least:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
