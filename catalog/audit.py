"""The audit journal: one JSON line for each request that touches data, appended and synced below ``<root>/audit/``.

Extraction loads the lines into table `audit` (see sphere.jobs.audit).
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

import orjson

from sphere.conf.errors import StorageError
from sphere.conf.private import make_private
from sphere.ingest.dayfile import DayFile
from sphere.ingest.storage.base import Appender, Storage

log = logging.getLogger(__name__)

FOLDER: Final = "audit"
PAUSE_S: Final = 0.2  # seconds in which records gather before they are written and synced together
PUBLISH_S: Final = 30.0  # seconds between times at which all hosts can read what was written, where that costs more
CLOSE_S: Final = 5.0  # seconds that a storage may take to write the last records
MAX_WAITING: Final = 100_000  # records
MAX_TEXT: Final = 64 << 10  # characters of a path or a query: more than the head of a request may have


def told(text: str) -> str:
    """A text as it is recorded: whole, or where it is too long its begin, and how much of what was left out."""
    if len(text) <= MAX_TEXT:
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{text[:MAX_TEXT]}... [cut: {len(text)} characters with SHA-256 {digest}]"


class AuditJournal:
    """Appends records to a file of this process and day. Thread-safe; what the storage refuses goes to `fallback`."""

    def __init__(
        self,
        storage: Storage,
        fallback: Path,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
    ) -> None:
        self._storage, self._fallback, self._clock = storage, fallback, clock
        self._waiting: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._file = DayFile(storage, FOLDER)
        self._hidden_since: float | None = None  # monotonic time of the first record that other hosts cannot read yet
        self._unwritten: list[bytes] = []  # records that the storage was given and has not confirmed
        self._stop = threading.Event()
        self._writing = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True, name="audit")
        self._thread.start()

    def add(self, **record: Any) -> None:
        """One record; it is durable within about PAUSE_S, or when `close` returns."""
        at = self._clock().isoformat(timespec="milliseconds")
        self._waiting.put(orjson.dumps({"at": at, **record}, option=orjson.OPT_APPEND_NEWLINE))

    def close(self) -> None:
        """Write what waits, and let go of the file; what a storage that hangs does not confirm is kept in `fallback`.

        Such records may be on the storage as well: a record is seen twice rather than lost.
        """
        self._stop.set()
        last = threading.Thread(target=self._finish, daemon=True, name="audit-close")
        last.start()
        last.join(CLOSE_S)
        if last.is_alive():
            log.error("audit journal: the storage does not answer; records go to %s", self._fallback)
            self._keep([*self._unwritten, *self._taken()])

    def _finish(self) -> None:
        self._thread.join()
        self.flush()
        with self._writing:
            self._file.close()

    def flush(self) -> None:
        """Write and sync what waits."""
        with self._writing:
            lines = self._taken()
            if lines:
                self._write(lines)
            elif self._hidden_since is not None and time.monotonic() - self._hidden_since > PUBLISH_S:
                self._write([])

    def _taken(self) -> list[bytes]:
        lines: list[bytes] = []
        while len(lines) < MAX_WAITING:
            try:
                lines.append(self._waiting.get_nowait())
            except queue.Empty:
                break
        return lines

    def _run(self) -> None:
        while not self._stop.wait(PAUSE_S):
            try:
                self.flush()
            except Exception as error:  # noqa: BLE001  the journal outlives whatever went wrong
                log.error("audit: %s", type(error).__name__)

    def _write(self, lines: list[bytes]) -> None:
        self._unwritten = lines
        try:
            appender = self._file.open(self._clock())
            appender.write(lines)
            self._make_durable(appender)
        except StorageError as error:
            log.error("audit journal: %s; records go to %s", error, self._fallback)
            self._file.abandon()
            self._keep(lines)
        self._unwritten = []

    def _keep(self, lines: list[bytes]) -> None:
        make_private(self._fallback.parent)
        with os.fdopen(
            os.open(self._fallback, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640), "ab"
        ) as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())

    def _make_durable(self, appender: Appender) -> None:
        """Sync, and from time to time publish where others cannot read a file that is being written (HDFS)."""
        now = time.monotonic()
        if self._hidden_since is None:
            self._hidden_since = now
        if self._storage.visible_at_once or now - self._hidden_since <= PUBLISH_S:
            appender.sync()
        else:
            appender.publish()
        if self._storage.visible_at_once or now - self._hidden_since > PUBLISH_S:
            self._hidden_since = None
