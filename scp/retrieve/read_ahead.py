"""Bytes of many instances from few reads: neighbours in a bundle are read together, and before they are needed.

Memory: QUEUE + 2 windows of WINDOW bytes for each retrieve under way (one being read, one being sent).
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

from sphere.conf.errors import StorageError
from sphere.ingest.storage.base import Readable

WINDOW = 2 << 20  # bytes of one read
GAP = 64 << 10  # bytes between two wanted ranges that are read rather than skipped: a tar header has some kB
QUEUE = 1  # windows read ahead
PUBLISHED_S = 3.0  # seconds until the last bytes of an open bundle can be read on HDFS (it promises 1)
POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes [offset, offset + length) of a bundle."""

    bundle: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Part of a window that is wanted: all or a part of a range; `last` where the range ends with it."""

    start: int
    length: int
    last: bool


@dataclass(frozen=True, slots=True)
class Window:
    """One read."""

    bundle: str
    offset: int
    length: int
    segments: tuple[Segment, ...]


def windows(ranges: Sequence[Range], size: int) -> Iterator[Window]:
    """The reads for some ranges, in their order; a range longer than a window of `size` bytes takes several."""
    bundle, begin, end = "", 0, 0
    segments: list[Segment] = []
    for one in ranges:
        at, left = one.offset, one.length
        while left or not one.length:
            fits = one.bundle == bundle and end <= at <= end + GAP and at < begin + size
            if segments and not fits:
                yield Window(bundle, begin, end - begin, tuple(segments))
                segments = []
            if not segments:
                bundle, begin = one.bundle, at
            taken = min(left, begin + size - at)
            if taken < left and len(segments) and one.length <= size:  # it fits whole into the next one
                yield Window(bundle, begin, end - begin, tuple(segments))
                segments, begin, taken = [], at, left
            segments.append(Segment(at - begin, taken, taken == left))
            at, left = at + taken, left - taken
            end = at
            if not one.length:
                break
    if segments:
        yield Window(bundle, begin, end - begin, tuple(segments))


Read = tuple[Window, memoryview | StorageError]


class Pieces:
    """The bytes of some ranges, in order, out of windows that were read."""

    def __init__(self, reads: Iterator[Read]) -> None:
        self._segments = _segments(reads)
        self._inside = False  # the range that was begun has segments left

    def next(self) -> Iterator[memoryview]:
        """The next range's bytes, in pieces that stay valid; what is left of the one before is passed over.

        Reading raises StorageError where they cannot be had; the ranges after it can.
        """
        while self._inside:
            self._inside = not next(self._segments)[0].last
        self._inside = True
        return self._pieces()

    def _pieces(self) -> Iterator[memoryview]:
        while self._inside:
            segment, piece = next(self._segments)
            self._inside = not segment.last
            if isinstance(piece, StorageError):
                raise piece
            yield piece


def _segments(reads: Iterator[Read]) -> Iterator[tuple[Segment, memoryview | StorageError]]:
    for window, data in reads:
        for segment in window.segments:
            if isinstance(data, StorageError):
                yield segment, data
            else:
                yield segment, data[segment.start : segment.start + segment.length]
        del window, data  # while the next one is read


class ReadAhead(Pieces):
    """The bytes of some ranges, in order, read by a thread of its own. To be closed."""

    def __init__(self, storage: Readable, ranges: Sequence[Range]) -> None:
        super().__init__(self._received())
        self._storage = storage
        self._windows: queue.Queue[Read | None] = queue.Queue(QUEUE)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read_all, args=(ranges,), daemon=True, name="read-ahead")
        self._thread.start()

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading."""
        self._stopped.set()
        while self._thread.is_alive():
            try:
                self._windows.get(timeout=POLL_S)
            except queue.Empty:
                continue

    def _received(self) -> Iterator[Read]:
        while (got := self._windows.get()) is not None:
            yield got
            del got

    def _read_all(self, ranges: Sequence[Range]) -> None:
        for window in windows(ranges, WINDOW):
            try:
                data: memoryview | StorageError = memoryview(self._read(window))
            except StorageError as error:
                data = error
            except Exception as error:  # noqa: BLE001  whatever it is must reach who waits for the bytes
                data = StorageError(f"reading {window.bundle}: {type(error).__name__}")
            if not self._put((window, data)):
                return
        self._put(None)

    def _read(self, window: Window) -> bytes:
        """All bytes of a window; waits for those of an open bundle that are still being published."""
        deadline = time.monotonic() + PUBLISHED_S
        while True:
            data = self._storage.read(window.bundle, window.offset, window.length)
            if len(data) == window.length:
                return data
            if time.monotonic() > deadline or self._stopped.wait(POLL_S):
                raise StorageError(f"{window.bundle} ends at byte {window.offset + len(data)}, before its members do")

    def _put(self, item: Read | None) -> bool:
        while not self._stopped.is_set():
            try:
                self._windows.put(item, timeout=POLL_S)
            except queue.Full:
                continue
            return True
        return False
