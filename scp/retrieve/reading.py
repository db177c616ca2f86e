"""The bytes of stored instances for who sends them: from files of this host when needed, from elsewhere ahead."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from io import FileIO
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING

from sphere.conf.errors import StorageError
from sphere.ingest.storage.base import Readable
from sphere.ingest.storage.paths import storage_error
from sphere.scp.retrieve.outbound import range_of
from sphere.scp.retrieve.read_ahead import Pieces, Range, Read, ReadAhead, Window, windows

if TYPE_CHECKING:
    from sphere.catalog.service import StoredInstance

WINDOW = 1 << 20  # bytes of one read: what is in the processor's cache until it is sent
AHEAD = 8  # windows that the kernel is asked to have in its cache by then


def reading(storage: Readable) -> Callable[[Sequence[StoredInstance]], InPlace | ReadAhead]:
    """What reads instances for a `Delivery`, in the way that is best for `storage`."""
    reader = InPlace if storage.in_files else ReadAhead
    return lambda instances: reader(storage, [range_of(instance) for instance in instances])


def advise(file: FileIO, offset: int, length: int) -> None:
    """Have the kernel begin to read, where it can be told."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), offset, length, os.POSIX_FADV_WILLNEED)


class InPlace(Pieces):
    """The bytes of some ranges, in order, each window read when it is needed. To be closed.

    The thread that sends them has the time: it makes an instance ready while its peer is busy with the one before. A
    thread of its own to read ahead would take turns with it; what reads ahead is the kernel.
    """

    def __init__(self, storage: Readable, ranges: Sequence[Range]) -> None:
        super().__init__(self._read_all(ranges))
        self._storage = storage
        self._file: FileIO | None = None
        self._bundle = ""  # what the file is
        self._advised = 0  # the end of what the kernel was told of it

    def __enter__(self) -> InPlace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._let_go()

    def _read_all(self, ranges: Sequence[Range]) -> Iterator[Read]:
        further = windows(ranges, WINDOW)
        coming = deque(islice(further, AHEAD))
        while coming:
            window = coming.popleft()
            coming.extend(islice(further, 1))
            yield from self._each(window, coming)

    def _each(self, window: Window, coming: Iterable[Window]) -> Iterator[Read]:
        """The window, or if it cannot be read whole, each segment for itself."""
        try:
            data = memoryview(self._read(window))
        except StorageError as error:
            if len(window.segments) == 1:
                yield window, error
                return
        else:
            self._advise(coming)
            yield window, data
            return
        for one in window.segments:
            alone = Window(window.bundle, window.offset + one.start, one.length, (replace(one, start=0),))
            yield from self._each(alone, coming)

    def _advise(self, coming: Iterable[Window]) -> None:
        assert self._file is not None
        for one in coming:
            if one.bundle == self._bundle and one.offset >= self._advised:
                advise(self._file, one.offset, one.length)
                self._advised = one.offset + one.length

    def _read(self, window: Window) -> bytes:
        file = self._opened(window.bundle)
        try:
            data = os.pread(file.fileno(), window.length, window.offset)
        except OSError as error:
            raise storage_error(error, f"reading {window.bundle}") from error
        if len(data) < window.length:
            raise StorageError(f"{window.bundle} ends at byte {window.offset + len(data)}, before its members do")
        return data

    def _opened(self, bundle: str) -> FileIO:
        if self._file is None or bundle != self._bundle:
            self._let_go()
            self._file, self._bundle, self._advised = self._storage.open(bundle), bundle, 0
        return self._file

    def _let_go(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
