"""One process of the host that stays ready to make indexes, shared by all that serve an archive.

Starting Python and delta-rs costs more than a refresh. The process (sphere.catalog.index_worker) listens on a Unix
socket beside the indexes and is started by who first needs it; it looks for new versions itself, so that a refresh is
mostly there before anybody asks. It lives as long as somebody is connected: whoever serves holds a connection. Where
there is none, or it dies, each index has a process of its own (sphere.catalog.index_process).
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Final

import duckdb
import orjson

from sphere.catalog.asof import AsOf
from sphere.catalog.index_folder import FORMAT
from sphere.catalog.index_process import IndexProcess, path_in
from sphere.conf.alone import alone
from sphere.conf.errors import CatalogError
from sphere.conf.handed import handed
from sphere.conf.private import make_private
from sphere.conf.settings import Settings

log = logging.getLogger(__name__)

HOLD_S: Final = 5.0
"""Seconds from the first index that a process opens until it wants the maker ready: who asks once is gone by then."""
BACKLOG: Final = 64
LONGEST: Final = 100
"""Bytes of a socket's address that every system takes (sun_path of unix(7) has 108, BSD's 104)."""


class IndexMaker:
    """Has indexes made as `IndexFolder.make` does. Thread-safe."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._folder = settings.archive.state_dir / "index"
        self._name = f"maker-{_identity(settings)}"
        self._apart = IndexProcess(settings, None)
        self._lock = threading.Lock()
        self._held: socket.socket | None = None
        self._asking: set[socket.socket] = set()
        self._timer: threading.Timer | None = None
        self._closed = False

    def hold(self) -> None:
        """From HOLD_S on, keep the maker ready until this is closed."""
        with self._lock:
            if self._timer is None and not self._closed:
                self._timer = threading.Timer(HOLD_S, self._hold)
                self._timer.daemon = True
                self._timer.start()

    def make(self, as_of: AsOf | None = None) -> Path:
        """As of IndexProcess."""
        if self._held is not None and (said := self._said(as_of) or self._said(as_of)):  # again where it was killed
            return path_in(said, otherwise="the maker of indexes did not say why")
        if self._closed:
            raise CatalogError("no index was made: nobody waits for it any more")
        return self._apart.make(as_of)

    def mend_rows(self, base: Path) -> None:
        """As of IndexProcess: a process of its own gives back the memory that it takes."""
        if self._closed:
            raise CatalogError("no rows were made: nobody waits for them any more")
        self._apart.mend_rows(base)

    def close(self) -> None:
        """Let go of the maker, and of what is asked of it."""
        with self._lock:
            self._closed = True
            if self._timer is not None:
                self._timer.cancel()
            for one in (*self._asking, *([self._held] if self._held else [])):
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            if self._held is not None:
                self._held.close()
        self._apart.close()

    def _said(self, as_of: AsOf | None) -> bytes:
        """The answer of the maker, started anew where there is none; empty where it does not come to one."""
        text = as_of.isoformat() if isinstance(as_of, datetime) else "" if as_of is None else str(as_of)
        try:
            with self._connected() as connection:
                connection.sendall(orjson.dumps({"as_of": text}) + b"\n")
                with connection.makefile("rb") as answers:
                    return answers.readline()
        except OSError as error:
            log.warning("the maker of indexes cannot be asked: %s", error.strerror)
            return b""

    @contextmanager
    def _connected(self) -> Iterator[socket.socket]:
        """A connection for one question."""
        with self._connect() as connection:
            with self._lock:
                if self._closed:
                    raise OSError(0, "closed meanwhile")
                self._asking.add(connection)
            try:
                yield connection
            finally:
                with self._lock:
                    self._asking.discard(connection)

    def _hold(self) -> None:
        try:
            self._connect().close()
        except OSError as error:
            log.warning("no maker of indexes can be kept ready: %s", error.strerror)

    def _connect(self) -> socket.socket:
        """A connection to the maker, which is started where nobody listens; another one is held ever after.

        Raises OSError.
        """
        make_private(self._folder)
        with _address(self._folder, f"{self._name}.sock") as address, alone(self._folder / f"{self._name}.lock"):
            try:
                connection = _connection(address)
            except (FileNotFoundError, ConnectionRefusedError):
                self._start(address)
                connection = _connection(address)
            with self._lock:
                if self._closed or not (self._held is None or _has_ended(self._held)):
                    return connection
                self._held = connection  # the first one: with the last one the maker ends
            return _connection(address)

    def _start(self, address: str) -> None:
        """Start the process with a socket that listens already: who connects meanwhile waits for it."""
        with suppress(FileNotFoundError):
            os.unlink(address)  # noqa: PTH108  an address, not a path
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen(BACKLOG)
            process = subprocess.Popen(
                [sys.executable, "-m", "sphere.catalog.index_process", str(listener.fileno())],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=[listener.fileno()],
            )  # fmt: skip
        threading.Thread(target=process.wait, daemon=True, name="index-maker").start()  # leaves no zombie
        assert process.stdin is not None
        with suppress(BrokenPipeError), process.stdin as to:
            to.write(handed(self._settings))
        log.info("maker of indexes started pid=%d", process.pid)


def _identity(settings: Settings) -> str:
    """What makers must have in common to stand in for each other: the archive, and the software."""
    parts = (settings.catalog_root, settings.storage.user, str(settings.archive.state_dir), str(FORMAT),
             duckdb.__version__, str(Path(__file__).resolve()))  # fmt: skip
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:8]


def _connection(address: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(address)
    except BaseException:
        connection.close()
        raise
    return connection


def _has_ended(connection: socket.socket) -> bool:
    """Whether the other side is gone: a maker never speaks first."""
    try:
        return not connection.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


@contextmanager
def _address(folder: Path, name: str) -> Iterator[str]:
    """An address of a socket in a folder: by way of the open folder where its path is too long for one (Linux)."""
    path = str(folder / name)
    if len(os.fsencode(path)) <= LONGEST:
        yield path
        return
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)
