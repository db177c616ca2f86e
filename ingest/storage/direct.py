"""Large appends past the page cache (O_DIRECT): for bytes that are synced at once, the cache is a copy and a detour."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence

LEAST = 1 << 14  # bytes from which on it is faster
_ALIGN = 512  # bytes: blocks of a tar, and of most disks; one with larger blocks says EINVAL
_BUFFER = 1 << 20  # bytes gathered for one write


class DirectWriter:
    """Writes to one file by its path. What it cannot do is left to the ordinary way.

    The kernel keeps readers right that go through the cache: it drops the pages that were written over.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._flag = getattr(os, "O_DIRECT", 0)  # not on every platform
        self._fd = -1
        self._view = memoryview(b"")

    def fits(self, offset: int, size: int) -> bool:
        """Whether a write of `size` bytes at `offset`, where the file ends, is worth trying."""
        return size >= LEAST and self.takes(offset, size)

    def takes(self, offset: int, size: int) -> bool:
        """Whether a write of `size` bytes at `offset` can be tried."""
        return bool(self._flag) and not (offset | size) % _ALIGN

    def write(self, views: Sequence[memoryview], offset: int) -> int:
        """Write the bytes of `views` at `offset`; how many of them, fewer where the file system refuses.

        Raises OSError.
        """
        filled = written = 0
        if not self._open():
            return 0
        if sum(map(len, views)) <= _BUFFER:
            for view in views:
                end = filled + len(view)
                self._view[filled:end] = view
                filled = end
            return self._put(filled, offset) if filled else 0
        for view in views:
            left = view
            while left:
                part = left[: _BUFFER - filled]
                self._view[filled : filled + len(part)] = part
                filled += len(part)
                left = left[len(part) :]
                if filled == _BUFFER:
                    done = self._put(filled, offset + written)
                    written += done
                    if done < filled:
                        return written
                    filled = 0
        return written + (self._put(filled, offset + written) if filled else 0)

    def close(self) -> None:
        """Let go; there is nothing that waits."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _open(self) -> bool:
        if self._fd < 0:
            try:
                self._fd = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC | self._flag)
            except OSError as error:
                self._refused(error)
                return False
            self._view = memoryview(mmap.mmap(-1, _BUFFER))  # begins at a page, as O_DIRECT wants it
        return True

    def _put(self, size: int, offset: int) -> int:
        try:
            return os.pwrite(self._fd, self._view[:size], offset)
        except OSError as error:
            self._refused(error)
            return 0

    def _refused(self, error: OSError) -> None:
        if error.errno != errno.EINVAL:
            raise error
        self._flag = 0
