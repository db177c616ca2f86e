"""Ends statements of the database whose answer nobody wants any more.

A statement that matches nothing may read for minutes without giving a row, and whoever put it stands still meanwhile.
So one that takes longer than AFTER_S is watched by a thread of its own, which asks `cancelled` in place of who waits,
never beside it, and interrupts.
"""

from __future__ import annotations

import threading
import time
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Final

import duckdb

from sphere.catalog.cancel import Cancelled, never

AFTER_S: Final = 0.1
EVERY_S: Final = 0.1


class _Statement:
    """A cursor that is busy within `with`, as often as wanted. Raises duckdb.InterruptException at its end where it
    was interrupted, or had just been about to be."""

    def __init__(self, cursor: duckdb.DuckDBPyConnection, cancelled: Cancelled) -> None:
        self._cursor, self._cancelled = cursor, cancelled
        self._lock = threading.Condition(threading.Lock())
        self._busy = self._interrupted = False
        self.watched = False
        self.since = 0.0

    def __enter__(self) -> None:
        self._busy, self.since = True, time.monotonic()
        _running.add(self)
        _see_to_it()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._busy = False
            self._lock.notify()
        _running.discard(self)
        if self._interrupted and error is None:
            raise duckdb.InterruptException("nobody waits for the answer")

    def watch(self) -> None:
        """Interrupt when it is no longer wanted, as long as it is busy: between two statements one would be lost."""
        with self._lock:
            while self._busy:
                if self._cancelled():
                    self._interrupted = True
                    self._cursor.interrupt()
                self._lock.wait(EVERY_S)
            self.watched = False


def interrupted(cursor: duckdb.DuckDBPyConnection, cancelled: Cancelled) -> AbstractContextManager[None]:
    """What the cursor does within `with` ends when `cancelled`: then that raises duckdb.InterruptException."""
    return nullcontext() if cancelled is never else _Statement(cursor, cancelled)


_running: set[_Statement] = set()
_any = threading.Event()
_starting = threading.Lock()
_watcher = threading.Thread()


def _see_to_it() -> None:
    global _watcher  # noqa: PLW0603  one thread of the process; in a forked one it is not alive
    if not _any.is_set():
        _any.set()
    if not _watcher.is_alive():
        with _starting:
            if not _watcher.is_alive():
                _watcher = threading.Thread(target=_watch_all, daemon=True, name="statements")
                _watcher.start()


def _watch_all() -> None:
    """Give those that take long a thread: what tells whether they are wanted may have to read from a slow peer."""
    while True:
        _any.wait()
        time.sleep(AFTER_S)
        if not _running:
            _any.clear()
            if _running:  # one that began meanwhile
                _any.set()
        _watch_long_ones()


def _watch_long_ones() -> None:
    now = time.monotonic()
    for one in list(_running):
        if not one.watched and now - one.since >= AFTER_S:
            one.watched = True
            threading.Thread(target=one.watch, daemon=True, name="statement").start()
