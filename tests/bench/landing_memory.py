"""What a receiver has resident at most: after many instances, and after one that is larger than its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from tests.bench import landing_servers as servers
from tests.support.raw_peer import RawPeer, identifying

LIMIT_MB = 150  # of 10^6 bytes
MANY = 5000  # instances of 40 kB
FRAGMENT = 131072 - 6  # bytes of a fragment in a P-DATA-TF PDU of the length that we announce

Say = Callable[[str, bool, str], None]


def measure(base: Path, huge_mib: int, say: Say) -> None:
    """Send them to one receiver and tell its peak after each."""
    with servers.sphere(base / "memory", workers=1) as (port, processes, _):
        sizes = {"start": (0, 0), f"{MANY} instances of 40 kB": (MANY, 40_000)}
        sizes[f"one instance of {huge_mib} MiB"] = (1, huge_mib << 20)
        for what, (count, size) in sizes.items():
            _send(port, count, size)
            peak = servers.peak_mb(processes)
            say(f"receiver, {what}: {peak:.0f} MB resident at most", peak < LIMIT_MB, f"less than {LIMIT_MB} MB")


def _send(port: int, count: int, size: int) -> None:
    peer = RawPeer.connect(port, timeout=300)
    peer.associate()
    for number in range(count):
        uid = f"1.2.{number}"
        if peer.store(uid, _fragments(uid, size), message_id=number % 65535 + 1) != 0:
            raise AssertionError("not stored")
    peer.release()


def _fragments(uid: str, size: int) -> Iterator[bytes]:
    """An instance of `size` bytes, nearly all zeros, never all of it at once."""
    whole, first = bytes(FRAGMENT), identifying(uid)
    yield first
    left = size - len(first)
    for _ in range(left // FRAGMENT):
        yield whole
    yield whole[: left % FRAGMENT]
