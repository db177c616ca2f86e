"""Whether a storage can be written to now: asked at most every few seconds, and never waited for long."""

from __future__ import annotations

import hashlib
import logging
import socket
import threading
import time
from collections.abc import Callable

from sphere.conf.errors import StorageError, StorageMissing
from sphere.conf.settings import Settings
from sphere.ingest.spool import spool_storage
from sphere.ingest.storage import open_storage
from sphere.ingest.storage.base import Storage
from sphere.ingest.storage.local import LocalStorage
from sphere.ingest.storage.paths import TEMPORARY

KEPT_S = 5.0  # seconds for which an answer is given again
WAIT_S = 5.0  # seconds without an answer after which the storage is taken for away
STUCK_S = 60.0  # seconds after which such a look is left to itself and another one made; doubled each time
log = logging.getLogger(__name__)


class Probe:
    """Looks at one storage, in a thread of its own. Safe to share between threads.

    `look` returns when the storage takes writes and raises StorageError otherwise.
    """

    def __init__(self, name: str, look: Callable[[], None]) -> None:
        self.name = name
        self._look = look
        self._lock = threading.Lock()
        self._over = threading.Event()  # of the look under way; set where there is none
        self._over.set()
        self._began = self._ended = float("-inf")  # monotonic times
        self._stuck_s = STUCK_S
        self._problem = ""  # what the last look found

    def away(self, *, wait: bool = True) -> bool:
        """Whether the storage is away: by a look of the last KEPT_S seconds, or by a new one, which has WAIT_S.

        Without `wait` by the last look that ended; a new one is begun where that is old.
        """
        with self._lock:
            now = time.monotonic()
            if not self._over.is_set() and now - self._began > self._stuck_s:
                self._stuck_s *= 2  # so that few are ever left behind
                self._over.set()
            if self._over.is_set() and now - self._ended > KEPT_S:
                self._begin(now)
            over, left = self._over, self._began + WAIT_S - now
        answered = over.wait(max(0.0, left) if wait else 0)
        with self._lock:
            if not answered and over is self._over and not over.is_set() and (wait or left <= 0):
                self._tell(f"no answer within {WAIT_S:.0f} s")
            return bool(self._problem)

    def _begin(self, now: float) -> None:
        self._began, self._over = now, threading.Event()
        threading.Thread(target=self._run, args=(self._over,), daemon=True, name=f"probe-{self.name}").start()

    def _run(self, over: threading.Event) -> None:
        problem = "ended by a defect"
        try:
            self._look()
            problem = ""
        except StorageError as error:
            problem = str(error)
        finally:
            with self._lock:
                if over is self._over:  # it was not left to itself
                    self._ended = time.monotonic()
                    self._stuck_s = STUCK_S
                    self._tell(problem)
                over.set()

    def _tell(self, problem: str) -> None:
        """Keep what was found, and log it where it is something else than before."""
        if bool(problem) != bool(self._problem):
            log.warning("%s %s", self.name, f"is away: {problem}" if problem else "is back")
        self._problem = problem


def probes(settings: Settings) -> tuple[list[Probe], list[Probe]]:
    """Those of the storages that receiving needs, and of those that it can do without for a while.

    With a spool that is the spool, and the storage.
    """
    name = _name(settings)
    kept = settings.storage
    storage = Probe("storage", _Look(name, lambda: open_storage(kept.root, user=kept.user)))
    if settings.ingest.durability != "spool":
        return [storage], []
    return [Probe("spool", _Look(name, lambda: spool_storage(settings)))], [storage]


class _Look:
    """Writes a file and removes it. A root that was there is not made again: what it held is gone, or not mounted."""

    def __init__(self, name: str, opened: Callable[[], Storage]) -> None:
        self._name, self._opened = name, opened
        self._seen = False

    def __call__(self) -> None:
        storage = self._opened()
        if isinstance(storage, LocalStorage):
            if self._seen and not storage.root.is_dir():
                raise StorageMissing(f"{storage.root} is no more")
            storage.write(self._name, b"ready\n")  # some bytes: a disk that is full takes none
        else:
            storage.delete(self._name)  # of a process that was killed here
            appender = storage.create(self._name)  # without bytes: DataNodes come and go, and landing copes with that
            try:
                appender.close()
            finally:
                appender.abandon()
        storage.delete(self._name)
        self._seen = True


def _name(settings: Settings) -> str:
    """One for each host and archive: what a killed process leaves is written over by the next one."""
    one = hashlib.sha256(f"{socket.gethostname()} {settings.archive.state_dir}".encode()).hexdigest()
    return f".ready-{one[:16]}{TEMPORARY}"
