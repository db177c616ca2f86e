"""Requests for commitment that wait for their report: one file each on this host, durable before they are accepted."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sphere.conf.errors import SphereError, StorageError
from sphere.conf.private import make_private

MAX_WAITING = 10_000  # transactions; each has at most some MB of references
_SUFFIX = ".json"


class TooManyWaiting(SphereError):
    """Reports cannot be delivered as fast as they are asked for."""

    dimse, http = 0x0213, 503  # Resource limitation (PS3.7 C.5.26)


@dataclass(frozen=True, slots=True)
class Reference:
    """An instance whose safekeeping is asked for."""

    SOPClassUID: str
    SOPInstanceUID: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Transaction:
    """One N-ACTION request. Times are seconds since 1970.

    `duplicate`: its UID was in use for something else when it came.
    """

    uid: str
    requester: str  # AE title
    address: str
    references: tuple[Reference, ...]
    received: float
    due: float
    tries: int = 0
    duplicate: bool = False


@dataclass(frozen=True, slots=True)
class Waiting:
    """A transaction in short: its file, and when that was written (nanoseconds)."""

    name: str
    requester: str
    received: float
    due: float
    stamp: int


class Transactions:
    """The waiting transactions of a host, shared by its receivers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[str, Waiting] = {}  # of the one thread that asks what waits

    def accept(self, transaction: Transaction) -> Transaction:
        """Return when it is durable; the same request again is the one that waits already.

        Raises TooManyWaiting, and StorageError where it cannot be written.
        """
        try:
            make_private(self._folder)
            with self._alone():
                before = _read(self._path(transaction))
                if before is not None and before.references != transaction.references:
                    transaction = replace(transaction, duplicate=True)
                if before is None and sum(1 for _ in self._folder.glob(f"*{_SUFFIX}")) >= MAX_WAITING:
                    raise TooManyWaiting(f"{MAX_WAITING} transactions wait for their report")
                self._write(transaction)
        except OSError as error:
            raise StorageError(f"the transaction cannot be kept: {error.strerror}") from None
        return transaction

    def waiting(self) -> list[Waiting]:
        """What waits, the oldest first, without its references; a file is read once for each change of it."""
        seen: dict[str, Waiting] = {}
        for entry in os.scandir(self._folder):
            if entry.name.endswith(_SUFFIX):
                with suppress(FileNotFoundError):  # reported just now
                    stamp = entry.stat().st_mtime_ns
                    before = self._seen.get(entry.name)
                    one = before if before and before.stamp == stamp else self._look_at(entry.name, stamp)
                    if one is not None:
                        seen[entry.name] = one
        self._seen = seen
        return sorted(seen.values(), key=lambda one: one.received)

    def _look_at(self, name: str, stamp: int) -> Waiting | None:
        found = _read(self._folder / name)
        return Waiting(name, found.requester, found.received, found.due, stamp) if found is not None else None

    def read(self, waiting: Waiting) -> Transaction | None:
        """It, with its references; None where it was reported meanwhile."""
        return _read(self._folder / waiting.name)

    def again(self, transaction: Transaction, *, after_s: float, tries: int) -> None:
        """Have it reported in `after_s` seconds; raises StorageError."""
        try:
            self._write(replace(transaction, due=time.time() + after_s, tries=tries))
        except OSError as error:
            raise StorageError(f"the transaction cannot be kept: {error.strerror}") from None

    def done(self, transaction: Transaction) -> None:
        """It was reported; raises StorageError where it still seems to wait."""
        try:
            self._path(transaction).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"the transaction cannot be removed: {error.strerror}") from None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other thread or process accepts meanwhile: two that found a UID unused would keep one request of two."""
        lock = os.open(self._folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _path(self, transaction: Transaction) -> Path:
        named = [transaction.requester, transaction.uid]
        if transaction.duplicate:
            named.append(str(transaction.received))
        return self._folder / (hashlib.sha256("\0".join(named).encode()).hexdigest()[:32] + _SUFFIX)

    def _write(self, transaction: Transaction) -> None:
        path = self._path(transaction)
        # another thread may write the same one: the request comes again while its report is put off
        part = path.with_suffix(f".{os.getpid()}-{threading.get_native_id()}.part")
        try:
            with part.open("w", encoding="utf-8") as file:
                json.dump(asdict(transaction), file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except OSError:
            part.unlink(missing_ok=True)
            raise
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _read(path: Path) -> Transaction | None:
    """The transaction of a file; None where it was reported meanwhile, or is none."""
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        references = tuple(Reference(**one) for one in fields.pop("references"))
        return Transaction(references=references, **fields)
    except (OSError, ValueError, TypeError, KeyError):
        return None
