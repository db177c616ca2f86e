"""Drops what DataNodes have written from the page cache: ``python -m tests.bench.landing_pages FOLDER`` until killed.

Hadoop does so itself by ``dfs.datanode.drop.cache.behind.writes`` where its native library is there, which the servers
of the tests lack. Without it every block takes fresh pages. On a virtual machine those that its host has to find first
cost ten times as much as others, so that an instance cost HDFS 1.4 or 3 ms of CPU by chance.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LAG = 8 << 20  # bytes behind the end of a block that stay (BlockReceiver.CACHE_DROP_LAG_BYTES)
WHOLE = 1 << 21  # bytes: parts that are dropped end at a multiple of it
PAUSE_S = 0.25  # seconds between looks


@contextmanager
def dropping(folder: Path) -> Iterator[None]:
    """Meanwhile, drop them for the DataNodes of the cluster in `folder`, in a process of its own."""
    process = subprocess.Popen([sys.executable, "-m", "tests.bench.landing_pages", str(folder)])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def drop(folder: Path, dropped: dict[int, int]) -> None:
    """Look once; `dropped` are the bytes of each block, by its inode, that have been dropped."""
    for pool in folder.glob("datanode*/current/BP-*/current"):
        for path in (*pool.glob("rbw/blk_*"), *pool.glob("finalized/*/*/blk_*")):
            if path.suffix != ".meta":
                try:
                    _drop_file(path, dropped)
                except FileNotFoundError:  # moved when its block was finished
                    continue


def _drop_file(path: Path, dropped: dict[int, int]) -> None:
    status = path.stat()
    start, end = dropped.get(status.st_ino, 0), (status.st_size - LAG) // WHOLE * WHOLE
    if end > start:
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), start, end - start, os.POSIX_FADV_DONTNEED)
        dropped[status.st_ino] = end


def main(arguments: list[str]) -> None:
    """Drop until killed, or until who started it is gone."""
    dropped: dict[int, int] = {}
    parent = os.getppid()
    while os.getppid() == parent:
        drop(Path(arguments[0]), dropped)
        time.sleep(PAUSE_S)


if __name__ == "__main__":
    main(sys.argv[1:])
