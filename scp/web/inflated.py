"""Values of deflated instances (PS3.5 A.5): inflated while they are handed on, in bounded memory.

A deflated data set has no places to read from: what lies before a value is inflated with it, and let go.
"""

from __future__ import annotations

import zlib
from collections.abc import Generator, Iterable
from contextlib import closing
from typing import Final

from sphere.catalog.service import StoredInstance
from sphere.scp.retrieve.outbound import range_of
from sphere.scp.web.archive import Archive

MAX_INFLATED: Final = 1 << 30  # bytes inflated to reach the end of a value
STEP: Final = 1 << 18  # bytes inflated at once


def inflated(archive: Archive, instance: StoredInstance, offset: int, length: int) -> Generator[bytes, None, None]:
    """Bytes [offset, offset + length) of the inflated data set, at most STEP at once; fewer where it ends before them,
    or where its stream breaks."""
    with closing(archive.pieces(range_of(instance))) as pieces, closing(_plain(pieces, offset + length)) as plain:
        passed = 0
        for part in plain:
            wanted = part[max(0, offset - passed) :]
            passed += len(part)
            if wanted:
                yield wanted


def is_there(archive: Archive, instance: StoredInstance, end: int) -> bool:
    """Whether so many bytes can be inflated: to be known before the first of them is sent."""
    return sum(map(len, inflated(archive, instance, 0, end))) == end


def _plain(pieces: Iterable[bytes | memoryview], end: int) -> Generator[bytes, None, None]:
    """What a raw deflate stream (RFC 1951) holds, up to byte `end`; less where it ends or breaks before."""
    inflater, left = zlib.decompressobj(-zlib.MAX_WBITS), end
    for piece in pieces:
        waiting: bytes | memoryview = piece
        while left > 0 and not inflater.eof:
            try:
                part = inflater.decompress(waiting, min(STEP, left))
            except zlib.error:
                return
            waiting = inflater.unconsumed_tail
            if not part and not waiting:  # all of this piece is in, and out
                break
            left -= len(part)
            if part:
                yield part
        if left <= 0 or inflater.eof:
            return
