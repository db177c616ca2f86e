"""Of one SOPInstanceUID one instance at a time, over all processes of this host; who comes next sees what was stored.

All of them share a file of places, found by a hash of the UID. Who holds a place has a lock on its first byte, which
the kernel lets go of when the process dies, however it dies. In it stands where the instances are that were stored
last: of 30,000 or so. A thread holds one place at a time and waits for no other, so that none waits for itself.
See docs/decisions/0012-policy.md.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from sphere.conf.errors import StorageError
from sphere.conf.private import make_private
from sphere.ingest.folders import bundle_of
from sphere.ingest.journal import bundle_id
from sphere.ingest.records import MemberRecord

log = logging.getLogger(__name__)

PLACES = 8192
VERSIONS = 4  # entries of a place
WAIT_S = 20.0  # seconds that an instance waits for another one of its UID, which is being stored
PAUSE_S = 0.001  # seconds between looks whether another process has let go of a place

_NAME = "reservations-1"  # with the form of the file
_FORGOTTEN = struct.Struct("<Q")  # time (ns since 1970) of the newest entry that another one took the place of
_ENTRY = struct.Struct("<Q16s32sQQI84s")  # time, key, sha256, offset, length, dataset_offset, id of the bundle
_PLACE = _FORGOTTEN.size + VERSIONS * _ENTRY.size
_TIMES = struct.Struct(f"<Q{f'Q{_ENTRY.size - 8}x' * VERSIONS}")  # of a place: forgotten, and of each entry
_ENTRIES = range(_FORGOTTEN.size, _PLACE, _ENTRY.size)
_EMPTY = bytes(_PLACE)
_LOCK = struct.Struct("hhqqi0q")  # struct flock of fcntl(2): type, whence, start, length, process


@dataclass(frozen=True, slots=True)
class Stored:
    """Where some bytes of an instance are (as of MemberRecord), as a process of this host has told."""

    sha256: str
    bundle: str
    offset: int
    length: int
    dataset_offset: int


class Reservation:
    """A place that is held until the end of `with`."""

    __slots__ = ("_data", "_key", "_of", "forgotten_at", "number")

    def __init__(self, of: Reservations, number: int, key: bytes) -> None:
        self._of, self._key = of, key
        self.number = number
        self.forgotten_at = 0
        """What came until then (ns since 1970) need not be among `stored`."""
        self._data = _EMPTY

    def has(self, data: bytes) -> Reservation:
        """Itself, with what stands in the place."""
        self._data = data
        self.forgotten_at = _FORGOTTEN.unpack_from(data)[0]
        return self

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._of.let_go(self.number)

    def stored(self) -> list[Stored]:
        """The versions of the instance, the first one first."""
        if self._key not in self._data:
            return []
        found = sorted(_ENTRY.unpack_from(self._data, at) for at in _ENTRIES)
        return [
            Stored(sha.hex(), bundle_of(bundle.rstrip(b"\0").decode()), *where)
            for _, key, sha, *where, bundle in found
            if key == self._key
        ]

    def add(self, record: MemberRecord) -> None:
        """The instance was stored: whoever holds the place next sees it."""
        data = bytearray(self._data)
        forgotten_at, *times = _TIMES.unpack(data)
        oldest = min(times)
        if oldest > forgotten_at:
            _FORGOTTEN.pack_into(data, 0, oldest)
        _ENTRY.pack_into(
            data, _ENTRIES[times.index(oldest)], time.time_ns(), self._key, bytes.fromhex(record.sha256),
            record.offset, record.length, record.dataset_offset, bundle_id(record.bundle).encode(),
        )  # fmt: skip
        self._of.write(self.number, self.has(bytes(data))._data)


class Reservations:
    """One per process, made after it was forked; shared by its threads."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / _NAME
        self._fd = -1
        self._held: dict[int, Reservation] = {}
        self._waiting = 0  # changed under `_changed`, after which `_held` is looked at again
        self._changed = threading.Condition(threading.Lock())
        self._told = False
        self._shared()

    def hold(self, uid: str) -> Reservation:
        """The place of an instance, when nobody else has it; raises StorageError after WAIT_S.

        Where the file cannot be had or locked, threads of this process wait for each other all the same.
        """
        key = blake2b(uid.encode("utf-8", "backslashreplace"), digest_size=16).digest()
        number = int.from_bytes(key[:4], "little") % PLACES
        place, give_up = Reservation(self, number, key), time.monotonic() + WAIT_S
        if self._held.setdefault(number, place) is not place:  # one step, without a lock: a thread gets it or not
            self._wait_here(place, give_up)
        try:
            return self._hold_everywhere(place, give_up)
        except BaseException:
            self._let_go_here(number)
            raise

    def let_go(self, number: int) -> None:
        """End a reservation."""
        try:
            self._lock(fcntl.F_UNLCK, number)
        except OSError as error:
            self._tell(error)
        finally:
            self._let_go_here(number)

    def write(self, number: int, data: bytes) -> None:
        """What stands in a place from now on."""
        if self._fd >= 0:
            try:
                os.pwrite(self._fd, data, number * _PLACE)
            except OSError as error:
                self._tell(error)

    def _wait_here(self, place: Reservation, give_up: float) -> None:
        with self._changed:
            self._waiting += 1
            try:
                while self._held.setdefault(place.number, place) is not place:
                    if not self._changed.wait(give_up - time.monotonic()):
                        raise _busy()
            finally:
                self._waiting -= 1

    def _let_go_here(self, number: int) -> None:
        del self._held[number]
        if self._waiting:
            with self._changed:
                self._changed.notify_all()

    def _hold_everywhere(self, place: Reservation, give_up: float) -> Reservation:
        """It, with what stands in it."""
        try:
            if self._fd < 0 and not self._shared():
                return place
            while not self._lock(fcntl.F_WRLCK, place.number):
                if time.monotonic() > give_up:
                    raise _busy()
                time.sleep(PAUSE_S)
            data = os.pread(self._fd, _PLACE, place.number * _PLACE)
            return place.has(data) if len(data) == _PLACE else place
        except OSError as error:
            self._tell(error)
            return place

    def _lock(self, kind: int, number: int) -> bool:
        """Whether the lock is changed; of an open file, not of a process, so that closing another one loses nothing."""
        if self._fd >= 0:
            try:
                fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _LOCK.pack(kind, os.SEEK_SET, number * _PLACE, 1, 0))
            except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, as fcntl(2) says
                return False
        return True

    def _shared(self) -> bool:
        """Whether there is the file; it is made where a disk that was full has room again."""
        if self._fd < 0:
            try:
                self._fd = _open(self._path)
            except OSError as error:
                self._tell(error)
        return self._fd >= 0

    def _tell(self, error: OSError) -> None:
        if not self._told:
            log.warning("%s: %s; copies that other processes store now may be stored again", self._path, error)
        self._told = True


def _open(path: Path) -> int:
    """The file, made whole before anybody sees it, and with all its room: what is written later always fits."""
    with suppress(FileNotFoundError):
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    make_private(path.parent)
    new = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
        try:
            os.posix_fallocate(fd, 0, PLACES * _PLACE)
        finally:
            os.close(fd)
        with suppress(FileExistsError):  # another process was faster
            os.link(new, path)
    finally:
        new.unlink(missing_ok=True)
    return os.open(path, os.O_RDWR | os.O_CLOEXEC)


def _busy() -> StorageError:
    return StorageError(f"another instance of this UID has been under way for {WAIT_S:.0f} s; send it again")
