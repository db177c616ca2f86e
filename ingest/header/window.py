"""The part of a member that is in memory: grown on demand, moved forward over what is skipped, bounded."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Final

Fetch = Callable[[int, int], bytes]

_CHUNK: Final = 16 * 1024
_MAX_CHUNK: Final = 1024 * 1024
_UNKNOWN_SIZE: Final = 1 << 62


class HeaderTooLarge(Exception):
    """More header bytes were needed than the limit allows."""


class InflatesTooLarge(HeaderTooLarge):
    """A deflated header grew beyond the limit."""


class InflateFailed(Exception):
    """A deflated data set that is not a zlib or raw deflate stream."""


class Window:
    """Bytes ``[base, base + len(buf))`` of a source of `size` bytes.

    Positions are absolute and only move forward: bytes before a loaded position may be let go. `limit` bounds the
    bytes taken from `fetch`; HeaderTooLarge is raised before it is passed. A source that gives fewer bytes than it was
    asked for ends there.
    """

    __slots__ = ("_fetch", "_limit", "_taken", "base", "buf", "size")

    def __init__(self, buf: bytes, *, size: int, fetch: Fetch, limit: int) -> None:
        self.buf = buf
        self.base = 0
        self.size = max(size, len(buf))
        self._fetch = fetch
        self._limit = limit
        self._taken = 0

    def load(self, pos: int, count: int) -> int:
        """Have ``[pos, pos + count)`` in ``buf`` as far as the source reaches; the index of `pos` in ``buf``."""
        index = pos - self.base
        have = self.base + len(self.buf)
        if pos + count <= have or have >= self.size:
            return index
        keep = self.buf[index:] if pos < have else b""
        start = max(have, pos)
        want = pos + count - start
        ahead = min(max(want, _CHUNK, min(self._taken, _MAX_CHUNK)), self.size - start)
        room = self._limit - self._taken
        if want > room and self.size - start > room:
            raise HeaderTooLarge
        got = self._fetch(start, min(ahead, room)) if ahead > 0 else b""
        self._taken += len(got)
        if len(got) < min(ahead, room):
            self.size = start + len(got)
        self.buf = keep + got
        self.base = pos
        return 0


class Inflater:
    """A deflated data set (PS3.5 A.5) as a source for a Window: inflated as far as asked, from the front to the end.

    `limit` bounds all bytes inflated, skipped ones included; InflatesTooLarge is raised when more are asked for.
    """

    def __init__(self, fetch: Fetch, *, offset: int, size: int, limit: int) -> None:
        self._fetch, self._offset, self._size, self._limit = fetch, offset, size, limit
        self._stream = zlib.decompressobj(-zlib.MAX_WBITS)
        self._pos = 0

    @property
    def size(self) -> int:
        """Nobody knows how large the data set is; the stream's end says so."""
        return _UNKNOWN_SIZE

    def fetch(self, pos: int, count: int) -> bytes:
        """Inflated bytes ``[pos, pos + count)``; `pos` never goes back. Fewer at the end or where the stream breaks."""
        while self._pos < pos:
            if not self._take(min(pos - self._pos, _MAX_CHUNK)):
                return b""
        parts = []
        while count > 0 and (part := self._take(count)):
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def _take(self, count: int) -> bytes:
        if self._pos >= self._limit:
            raise InflatesTooLarge
        count = min(count, self._limit - self._pos)
        while not self._stream.eof:
            try:
                raw = self._stream.unconsumed_tail or self._more()
                part = self._stream.decompress(raw, count)
            except zlib.error:
                if self._pos == 0:
                    raise InflateFailed from None
                return b""
            if part:
                self._pos += len(part)
                return part
            if not raw:
                return b""
        return b""

    def _more(self) -> bytes:
        count = min(_CHUNK, self._size - self._offset)
        raw = self._fetch(self._offset, count) if count > 0 else b""
        self._offset += len(raw)
        return raw
