"""Reading the beginnings of many members with few reads: neighbours in a bundle come in one range."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from sphere.ingest.storage.base import Storage

PREFIX = 16 * 1024
"""Bytes of a member read at first: most headers are smaller, the others are read on by `fetch`."""
MAX_RANGE = 8 * 1024 * 1024
"""Bytes of one read at most."""
GAPS = {"file": 32 * 1024, "hdfs": 256 * 1024, "webhdfs": 512 * 1024}
"""Bytes between two wanted pieces that cost less to read than a second read, by URL scheme."""

Fetch = Callable[[int, int], bytes]
Member = tuple[str, int, int]  # bundle, offset, length


def prefixes(storage: Storage, members: Sequence[Member]) -> Iterator[tuple[bytes, Fetch]]:
    """(first bytes, a function that reads more) of each member, in the given order; both count from its first byte.

    Raises StorageError and StorageMissing where a bundle cannot be read.
    """
    gap = GAPS[storage.url.partition(":")[0]]
    for group in _neighbours(members, gap):
        bundle, start, _ = group[0]
        block = storage.read(bundle, start, _end(group[-1]) - start)
        for _, offset, length in group:
            yield block[offset - start : offset - start + min(length, PREFIX)], _fetch(storage, bundle, offset, length)


def _end(member: Member) -> int:
    return member[1] + min(member[2], PREFIX)


def _neighbours(members: Sequence[Member], gap: int) -> Iterator[list[Member]]:
    """Runs of members of one bundle whose first bytes lie in ascending order and near each other."""
    group: list[Member] = []
    for member in members:
        near = (
            group
            and member[0] == group[0][0]
            and 0 <= member[1] - _end(group[-1]) <= gap
            and _end(member) - group[0][1] <= MAX_RANGE
        )
        if group and not near:
            yield group
            group = []
        group.append(member)
    if group:
        yield group


def _fetch(storage: Storage, bundle: str, offset: int, length: int) -> Fetch:
    def fetch(start: int, count: int) -> bytes:
        return storage.read(bundle, offset + start, max(0, min(count, length - start)))

    return fetch
