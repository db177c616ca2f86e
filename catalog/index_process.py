"""Indexes made in a process of its own: delta-rs and what DuckDB needs to build one stay out of the process that
answers, and so do the pauses of an interpreter that both would share.

`python -m sphere.catalog.index_process` is its body: it reads one request from standard input, and ends before its
answer when that ends, as its parent has. With the number of a socket that listens, it stays: see
sphere.catalog.index_maker.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from sphere.conf.errors import CatalogError
from sphere.conf.handed import handed, take_over
from sphere.conf.settings import Settings

if TYPE_CHECKING:  # what a process is to do without, it must not have loaded before it says so
    from sphere.catalog.asof import AsOf
    from sphere.catalog.grant import Grant


class IndexProcess:
    """Makes indexes as `IndexFolder.make` does, in one process for each. Thread-safe."""

    def __init__(self, settings: Settings, grant: Grant | None) -> None:
        self._settings, self._grant = settings, grant
        self._running: set[subprocess.Popen[bytes]] = set()

    def make(self, as_of: AsOf | None = None) -> Path:
        """As of IndexFolder; raises CatalogError also where the process ended without an answer."""
        return self._asked(as_of, None)

    def mend_rows(self, base: Path) -> None:
        """As of IndexFolder; raises CatalogError as `make` does."""
        self._asked(None, base)

    def _asked(self, as_of: AsOf | None, mend: Path | None) -> Path:
        process = subprocess.Popen([sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin is not None and process.stdout is not None
        said = b""
        self._running.add(process)
        try:
            with suppress(BrokenPipeError), process:
                process.stdin.write(handed(self._settings) + pickle.dumps((self._grant, as_of, mend)))
                process.stdin.flush()
                said = process.stdout.read()
        finally:
            self._running.discard(process)
        return path_in(said, otherwise=f"its process ended with {process.returncode}")

    def close(self) -> None:
        """End what is under way; what it leaves, the next one removes."""
        for process in list(self._running):
            process.kill()


def path_in(answer: bytes, *, otherwise: str) -> Path:
    """The index that an answer names; raises CatalogError with what it says went wrong, or `otherwise`."""
    told = orjson.loads(answer or b"{}")
    if "path" in told:
        return Path(told["path"])
    raise CatalogError(told.get("error") or f"no index was made: {otherwise}")


def main() -> None:
    """Make what is asked for, or stay and make what others ask for."""
    settings = take_over(sys.stdin.buffer)
    if len(sys.argv) == 1:
        _make(settings)
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; who is connected decides
    from sphere.catalog.index_worker import Worker

    Worker(settings, socket.socket(fileno=int(sys.argv[1]))).serve()


def _make(settings: Settings) -> None:
    grant, as_of, mend = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True, name="parent").start()
    from sphere.catalog.index_folder import IndexFolder

    folder = IndexFolder(settings, grant)
    try:
        if mend is not None:
            folder.mend_rows(mend)
        answer = {"path": str(mend or folder.make(as_of))}
    except CatalogError as error:
        answer = {"error": str(error)}
    sys.stdout.buffer.write(orjson.dumps(answer))


def _end_with_parent() -> None:
    while os.read(0, 1 << 16):  # not through sys.stdin, whose lock the end of the interpreter would wait for, and abort
        continue
    os._exit(1)


if __name__ == "__main__":
    main()
