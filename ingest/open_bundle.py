"""One bundle from its creation to its seal, as the process that writes it sees it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from sphere.conf.errors import StorageError
from sphere.ingest import tar
from sphere.ingest.journal import JournalWriter, Sealed, bundle_id
from sphere.ingest.lock import BundleLock
from sphere.ingest.members import Prepared, line_start
from sphere.ingest.records import MemberRecord
from sphere.ingest.recovery import repair
from sphere.ingest.storage.base import Buffer, Storage

_log = logging.getLogger(__name__)


class OpenBundle:
    """A tar that grows, its journal, and the lock that says so. `good` is the end of its last durable member in bytes,
    `written_at` when that came (by the clock of the caller).

    `failed`: a write, sync or publication failed; nothing may be written to it any more but by `repair`.
    `settled`: sealed, or removed because it held nothing.
    """

    def __init__(
        self, storage: Storage, state_dir: Path, path: str, lock: BundleLock, now: float, *, attempt: int = 0
    ) -> None:
        self.path = path
        self.id = bundle_id(path)
        self.lock = lock
        self.opened_at = now
        self.good = 0
        self.failed = self.settled = False
        self.repair_at = now
        self._storage = storage
        self._state_dir = state_dir
        self._members = 0
        self._published = 0
        self._dirty_since = self.written_at = now
        self._line_start = line_start(path)
        self.lines = b""
        self.journal = JournalWriter(storage, state_dir, path)
        try:
            self._appender = storage.create(path, attempt)
        except StorageError:
            self.journal.discard()
            raise

    def put(self, group: Sequence[Prepared], now: float) -> list[MemberRecord]:
        """Write the members and return their records once all of them are durable; raises StorageError.

        `lines` are then those of the journal.
        """
        at = self.good
        if len(group) == 1 and group[0].digested is not None:
            self._put_late(group[0])
        else:
            self._put_all(group)
        records: list[MemberRecord] = []
        lines: list[bytes] = []
        for member in group:
            record = member.record(self.path, at)
            records.append(record)
            lines.append(member.line(self._line_start, record))
            at += len(member.header) + member.length + len(member.padding)
        if self._appender.tell() != at:
            raise StorageError(f"bundle {self.id}: {self._appender.tell()} bytes written where {at} were to be")
        self._appender.sync()
        if self._published == self.good:
            self._dirty_since = now
        self.written_at = now
        self.good = at
        self._members += len(records)
        self.lines = b"\n".join((*lines, b""))
        return records

    def _put_late(self, member: Prepared) -> None:
        """Write a member whose digest is still being taken: its headers, which have it, when all else is written."""
        self._appender.write_late(len(member.header), member.settle, [*member.buffers, member.padding])

    def _put_all(self, group: Sequence[Prepared]) -> None:
        buffers: list[Buffer] = []
        for member in group:
            buffers += [member.settle(), *member.buffers]
            if member.streamed is not None:
                self._appender.write(buffers)
                buffers = []
                for chunk in member.streamed.chunks():
                    self._appender.write([chunk])
            buffers.append(member.padding)
        self._appender.write(buffers)

    @property
    def hidden(self) -> bool:
        """Whether it holds members that are not published."""
        return self._published != self.good

    @property
    def unprepared(self) -> bool:
        """Whether it is time for `prepare`."""
        return self._appender.unprepared

    def prepare(self) -> None:
        """Do what the next `put` would have to wait for; raises StorageError."""
        self._appender.prepare()

    def publish_due(self, now: float, *, idle_s: float, load_s: float) -> bool:
        """Whether there is something to publish, and it was quiet for `idle_s` or is `load_s` old, in seconds."""
        return self.hidden and (now - self.written_at >= idle_s or now - self._dirty_since >= load_s)

    def publish(self) -> None:
        """Make the members readable everywhere; their journal lines follow by `journal.publish`."""
        self._appender.publish()
        self._published = self.good
        self.journal.take()

    def seal(self) -> None:
        """End the tar and the journal; sets `settled`, or `failed`."""
        try:
            self._appender.write([tar.END])
            self._appender.close()
            sealed = Sealed(self._members, self.good + len(tar.END))
            if (size := self._storage.size(self.path)) != sealed.size:
                raise StorageError(f"the storage has {size} bytes of it where {sealed.size} were written")
            self.journal.seal(sealed)
        except StorageError as error:
            _log.error("sealing bundle %s failed: %s", self.id, error)
            self.failed = True
        else:
            self.settled = True

    def repair(self, again_at: float) -> None:
        """Cut and seal after a failure, keeping what is known to be durable; sets `settled`, or `repair_at`."""
        self._appender.abandon()
        self.journal.abandon()
        try:
            repaired = repair(self._storage, self._state_dir, self.path, keep=self.good)
        except StorageError as error:
            _log.warning("bundle %s cannot be repaired yet: %s", self.id, error)
            self.repair_at = again_at
            return
        _log.info("bundle %s repaired: %d members, %d bytes cut", self.id, repaired.members, repaired.cut)
        self.settled = True
