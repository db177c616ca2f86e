"""Who calls: what a peer may do, and how much of it at once, over all receiver processes of the host.

Slots and rates are kept in small files below ``<state_dir>/limits``: a slot is a file that its holder has locked, so
that the kernel gives it back when the holder ends, however it ends.
"""

from __future__ import annotations

import fcntl
import logging
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sphere.conf.peers import Rights
from sphere.conf.private import make_private
from sphere.conf.settings import Settings
from sphere.scp.peers import CallingPolicy
from sphere.scp.upper.messages import Limits
from sphere.scp.upper.negotiation import Proposal
from sphere.scp.upper.protocol import CALLING_AE_NOT_RECOGNIZED, LOCAL_LIMIT_EXCEEDED, Rejection

log = logging.getLogger(__name__)

BURST_S = 1.0  # seconds of its rate that a peer may use at once
FORGOTTEN_S = 3600.0  # seconds ahead beyond which what a rate file says is of before the last boot
_TIMES = struct.Struct("<dd")


class Callers:
    """Admits associations. One per receiver process; what it counts, all processes of the host share."""

    def __init__(self, settings: Settings, policy: CallingPolicy) -> None:
        self._policy = policy
        self._settings = settings
        self._strangers = settings.strangers
        self._folder = settings.archive.state_dir / "limits"

    def admit(self, proposal: Proposal, address: str) -> Caller:
        """The caller of an association; raises Rejection for an unknown one, and for one that has too many.

        Too many is answered "local limit exceeded", transient (PS3.8 9.3.4): trying again later is right.
        """
        peer = self._policy.peer(proposal.calling, address)
        if peer is None and not self._policy.admits(proposal.calling, address):
            raise Rejection(*CALLING_AE_NOT_RECOGNIZED)
        name, rights = (f"peer-{peer.name}", peer) if peer else ("strangers", self._strangers)
        slot = take_slot(self._folder, f"{name}.association", rights.max_associations)
        if slot is None:
            log.warning("association refused: %s has its %d already", name, rights.max_associations)
            raise Rejection(*LOCAL_LIMIT_EXCEEDED)
        return Caller(name, rights, limits_of(rights, self._settings), self._folder, slot)


class Caller:
    """The peer of one association, or a stranger."""

    def __init__(self, name: str, rights: Rights, limits: Limits, folder: Path, slot: Slot) -> None:
        self.name = name
        self.rights = rights
        self.limits = limits
        self._folder = folder
        self._slot = slot
        self.at_end: Callable[[], None] | None = None

    def close(self) -> None:
        """The association is over."""
        self._slot.release()
        if self.at_end is not None:
            self.at_end()
            self.at_end = None

    @contextmanager
    def query(self) -> Iterator[bool]:
        """A place among the queries that it may have at once; False where there is none."""
        slot = take_slot(self._folder, f"{self.name}.query", self.rights.max_queries)
        try:
            yield slot is not None
        finally:
            if slot is not None:
                slot.release()

    def delay(self, size: int) -> float:
        """Seconds that its next instance has to wait after one of `size` bytes, for the rates to hold."""
        per_instance, per_mb = self.rights.max_instances_s, self.rights.max_mb_s
        if not per_instance and not per_mb:
            return 0.0
        costs = 1 / per_instance if per_instance else 0.0, size / 1e6 / per_mb if per_mb else 0.0
        try:
            return spend(self._folder / f"{self.name}.rate", costs)
        except OSError as error:  # what was stored is to be answered all the same
            log.warning("rate of %s is not held: %s", self.name, error)
            return 0.0


def limits_of(rights: Rights, settings: Settings) -> Limits:
    """The limits of an association: those of the caller where it has any."""
    idle_s = rights.idle_s or settings.dimse.network_timeout_s
    waits = [wait for wait in (rights.dimse_timeout_s or settings.dimse.dimse_timeout_s, idle_s) if wait]
    return Limits(
        memory=settings.storage.memory_mib << 20,
        folder=settings.archive.state_dir / "incoming",
        idle_s=idle_s,
        message_s=min(waits, default=0),
    )


class Slot:
    """One place of several; given back by `release`, or by the end of the process."""

    def __init__(self, fd: int = -1) -> None:
        self._fd = fd

    def release(self) -> None:
        """Give it back; may be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def take_slot(folder: Path, name: str, count: int) -> Slot | None:
    """One of `count` places (0: any number), None where all are taken, by whatever process of the host.

    A place whose file cannot be made, on a full disk, is one that is not counted: nobody is refused for it.
    """
    if not count:
        return Slot()
    for number in range(count):
        try:
            make_private(folder)
            fd = os.open(folder / f"{name}.{number}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as error:
            log.warning("%s is not counted: %s", name, error)
            return Slot()
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return Slot(fd)
        except BlockingIOError:
            os.close(fd)
    return None


def spend(path: Path, costs: tuple[float, float], *, clock: Callable[[], float] = time.monotonic) -> float:
    """Seconds to wait so that two rates hold, each of which this adds `costs` seconds to.

    For each, the file has the (monotonic) time at which all that was taken is paid for; BURST_S may be owed.
    """
    make_private(path.parent)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        data = os.pread(fd, _TIMES.size, 0)
        now = clock()
        paid = _TIMES.unpack(data) if len(data) == _TIMES.size else (now, now)
        due = [max(now, at if at - now < FORGOTTEN_S else now) + cost for at, cost in zip(paid, costs, strict=True)]
        os.pwrite(fd, _TIMES.pack(*due), 0)
    finally:
        os.close(fd)
    return max(0.0, max(due) - now - BURST_S)
