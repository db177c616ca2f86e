"""Whether a receiver refuses what it is sent because its storage takes no bytes, told to who watches it.

A look at the storage from outside may miss it: landing needs DataNodes, disks and room as well. So what the last
C-STORE met counts, and while that is a refusal the receiver tries to write by itself: who is told that it is not ready
sends nothing that could succeed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from sphere.conf.errors import StorageError
from sphere.ingest.bundle import NewMember
from sphere.ingest.records import MemberRecord

TRY_S = 2.0  # seconds between tries to write while instances are refused
log = logging.getLogger(__name__)


class Checked(Protocol):
    """What a writer of bundles does for us."""

    def store(self, member: NewMember) -> MemberRecord:
        """Return when the member is durable; raises StorageError."""

    def check(self) -> None:
        """Raise StorageError where nothing can be stored now."""


class ToldWriter:
    """A writer that tells whether it refuses: `tell` is called at each change. Thread-safe."""

    def __init__(self, writer: Checked, tell: Callable[[bool], None]) -> None:
        self._writer = writer
        self._tell = tell
        self._lock = threading.Lock()
        self._refuses = self._tries = False

    def store(self, member: NewMember) -> MemberRecord:
        """As the writer's."""
        try:
            record = self._writer.store(member)
        except StorageError:
            self._became(True)
            raise
        if self._refuses:
            self._became(False)
        return record

    def _try(self) -> None:
        """Return when something could be written, here or by a C-STORE."""
        while self._goes_on():
            time.sleep(TRY_S)
            try:
                self._writer.check()
            except StorageError as error:
                log.debug("still refused: %s", error)
            else:
                self._became(False)

    def _goes_on(self) -> bool:
        with self._lock:
            self._tries = self._refuses
            return self._tries

    def _became(self, refuses: bool) -> None:
        """Tell it where it is a change."""
        with self._lock:
            changed, self._refuses = refuses != self._refuses, refuses
            if changed:
                self._tell(refuses)
            if refuses and not self._tries:
                self._begin()
        if changed:
            log.warning("the storage %s", "refuses what arrives" if refuses else "takes what arrives again")

    def _begin(self) -> None:
        """Try from now on, or with the next refusal where there is no room for a thread."""
        with suppress(RuntimeError):
            threading.Thread(target=self._try, daemon=True, name="refusing").start()
            self._tries = True
