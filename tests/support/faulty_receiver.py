"""A receiver whose disk fails when told to; takes the place of tests.support.receiver as the body of a process.

The file ``fault`` in the archive's folder holds the call that fails (write or fsync) and the name of the error. Half of
what a failing write is given arrives; the file ``halves`` is there once that was so past the page cache.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support import receiver

FAULT, HALVES = "fault", "halves"
BLOCK = 512  # bytes, of which writes past the page cache are made


def main() -> None:
    """As tests.support.receiver, with failing system calls."""
    plan, halves = Path(sys.argv[2]) / FAULT, Path(sys.argv[2]) / HALVES
    writev, pwrite, fdatasync, fsync = os.writev, os.pwrite, os.fdatasync, os.fsync

    def failing(call: str) -> OSError | None:
        try:
            wanted, name = plan.read_text().split()
        except (FileNotFoundError, ValueError):
            return None
        number = int(getattr(errno, name))
        return OSError(number, os.strerror(number)) if wanted == call else None

    def faulty_writev(fd: int, buffers: Sequence[Any]) -> int:
        if error := failing("write"):
            writev(fd, [memoryview(buffers[0])[: len(buffers[0]) // 2]])  # half of it arrives
            raise error
        return writev(fd, buffers)

    def faulty_pwrite(fd: int, data: Any, offset: int) -> int:
        if error := failing("write"):
            half = len(data) // 2 // BLOCK * BLOCK
            if half and pwrite(fd, data[:half], offset) and data[0]:  # members begin with a name, zeros ahead do not
                halves.touch()
            raise error
        return pwrite(fd, data, offset)

    def faulty_fdatasync(fd: int) -> None:
        if error := failing("fsync"):
            raise error
        fdatasync(fd)

    def faulty_fsync(fd: int) -> None:
        if error := failing("fsync"):
            raise error
        fsync(fd)

    os.writev, os.pwrite, os.fdatasync, os.fsync = faulty_writev, faulty_pwrite, faulty_fdatasync, faulty_fsync  # type: ignore[assignment]
    receiver.main()


if __name__ == "__main__":
    main()
