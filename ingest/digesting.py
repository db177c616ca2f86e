"""SHA-256 of what is in memory, taken by another thread while this one goes on, until it waits for the disk."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

LEAST: Final = 1 << 17  # bytes from which on it takes longer than to wake another thread (60 us, and 10)


class _Work:
    """Some bytes to be digested; `done` is held until they are."""

    __slots__ = ("digest", "done", "error", "parts")

    def __init__(self, digest: Any, parts: Sequence[memoryview]) -> None:
        self.digest, self.parts = digest, parts
        self.done = threading.Lock()
        self.done.acquire()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            for part in self.parts:
                self.digest.update(part)
        except BaseException as error:  # noqa: BLE001  whatever it is, who waits has to hear of it
            self.error = error
        self.parts = ()

    def wait(self) -> None:
        """Return when all of it is in the digest; raises what digesting raised."""
        with self.done:
            if self.error is not None:
                raise self.error


class Beside:
    """The one thread of a process that digests for the others. It begins with the first work."""

    def __init__(self) -> None:
        self._free = threading.Lock()
        self._given = threading.Lock()  # released when there is work
        self._given.acquire()
        self._work: _Work | None = None
        self._process = 0  # whose thread it is: a fork leaves it behind

    def update(self, digest: Any, parts: Sequence[memoryview]) -> Callable[[], None] | None:
        """Have `parts` added to a digest of hashlib; what waits until they are, and raises what that raised. Neither
        may be touched before.

        None where the thread is at work for somebody else, or there is no room for one: nothing is done then.
        """
        if not self._free.acquire(blocking=False):
            return None
        if self._process != os.getpid():
            try:
                threading.Thread(target=self._run, name="digest", daemon=True).start()
            except RuntimeError:
                self._free.release()
                return None
            self._process = os.getpid()
        work = self._work = _Work(digest, parts)
        self._given.release()
        return work.wait

    def _run(self) -> None:
        while True:
            self._given.acquire()
            work, self._work = self._work, None
            assert work is not None
            work.run()
            self._free.release()
            work.done.release()
            del work
