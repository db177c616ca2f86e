"""Files that one process appends to: names that no other process gives, and one file a day."""

from __future__ import annotations

import logging
import os
import re
import secrets
import socket
from datetime import datetime

from sphere.conf.errors import StorageError
from sphere.ingest.storage.base import Appender, Storage

log = logging.getLogger(__name__)


def unique_name(now: datetime) -> str:
    """A name that sorts by the time (UTC) it was made, and that no other process of any host gives."""
    host = re.sub(r"[^A-Za-z0-9-]+", "-", socket.gethostname())[:40] or "host"
    return f"{now:%Y%m%dT%H%M%S%f}Z-{host}-{os.getpid()}-{secrets.token_hex(4)}"


class DayFile:
    """``<folder>/YYYY/MM/DD/<name>.jsonl`` of this process, a new one each day (UTC). Not for two threads at once."""

    def __init__(self, storage: Storage, folder: str) -> None:
        self._storage, self._folder = storage, folder
        self._appender: Appender | None = None
        self._day = ""

    def open(self, now: datetime) -> Appender:
        """That of the day of `now`; raises StorageError."""
        day = f"{now:%Y/%m/%d}"
        if self._appender is None or day != self._day:
            self.close()
            self._appender = self._storage.create(f"{self._folder}/{day}/{unique_name(now)}.jsonl")
            self._day = day
        return self._appender

    def close(self) -> None:
        """Let go of it; the next `open` makes another. What was synced stays, also where closing fails."""
        appender, self._appender = self._appender, None
        if appender is not None:
            try:
                appender.close()
            except StorageError as error:
                log.warning("%s: %s", self._folder, error)

    def abandon(self) -> None:
        """Let go of it as it is, after an error: its last line may be torn, and nothing is added to it any more."""
        appender, self._appender = self._appender, None
        if appender is not None:
            appender.abandon()
