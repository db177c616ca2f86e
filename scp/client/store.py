"""C-STORE as a user: files, or instances of the archive, to any peer (PS3.4 Annex B)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Generic, TypeVar

from sphere.catalog.service import StoredInstance
from sphere.conf.errors import PeerError
from sphere.conf.peers import Peer
from sphere.conf.settings import Settings
from sphere.ingest.header import identify
from sphere.ingest.media import open_regular
from sphere.ingest.members import FileRange
from sphere.ingest.storage.base import Readable
from sphere.scp.peers import describe
from sphere.scp.retrieve.deliver import Delivery, Outcome, Read
from sphere.scp.retrieve.outbound import SUCCESS, WARNINGS, Converter, Instance, groups, preferred_by
from sphere.scp.retrieve.reading import reading
from sphere.scp.upper.requestor import connect

WINDOW = 256  # instances looked at before an association is asked for: it proposes what they need
PREFIX = 1 << 16  # bytes of a file read to find its UIDs
OUT_OF_RESOURCES = range(0xA700, 0xA800)  # of a C-STORE: later it may work (PS3.4 Table B.2-1)
BACK_OFF_S = (1.0, 4.0, 15.0)  # seconds before the second and further tries


@dataclass(frozen=True, slots=True)
class StoreResult:
    """What became of a file or an instance; `status` is None where the peer was not asked or did not answer.

    `source` is the file's path, or the instance's SOP Instance UID; `size` are the bytes of its data set.
    """

    source: Path | str
    status: int | None
    error: str = ""
    size: int = 0

    @property
    def stored(self) -> bool:
        """Whether the peer has the instance."""
        return self.status is not None and (self.status == SUCCESS or self.status in WARNINGS)


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    SOPClassUID: str
    SOPInstanceUID: str
    transfer_syntax_uid: str
    dataset_offset: int
    dataset_length: int


T = TypeVar("T", bound=Instance)


def store(
    peer: Peer,
    paths: Iterable[Path],
    *,
    settings: Settings,
    converter: Converter | None = None,
    tries: int = 1,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[StoreResult]:
    """Send files, one result for each, as they come.

    A file goes as it is where the peer accepts that, else in another transfer syntax if a `converter` can make it. One
    that is no DICOM, that the peer does not accept or that ends the association has its error in its result, and the
    next ones go on. What was lost with an association, or refused for want of resources, is tried again, with growing
    pauses. Raises PeerError when nothing could be sent any more, and files are left.
    """
    sending = _Sending(peer, settings, _Files, lambda file: file.path, converter, tries, sleep)
    yield from sending.all(map(_look_at, paths))


def store_instances(
    peer: Peer,
    instances: Iterable[StoredInstance],
    storage: Readable,
    *,
    settings: Settings,
    converter: Converter | None = None,
    tries: int = 1,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[StoreResult]:
    """The same with instances of the archive, straight from their bundles."""
    sending = _Sending(peer, settings, reading(storage), lambda one: one.SOPInstanceUID, converter, tries, sleep)
    yield from sending.all(instances)


@dataclass(frozen=True, slots=True)
class _Sending(Generic[T]):
    peer: Peer
    settings: Settings
    read: Read[T]
    name: Callable[[T], Path | str]
    converter: Converter | None
    tries: int
    sleep: Callable[[float], None]

    def all(self, items: Iterable[T | StoreResult]) -> Iterator[StoreResult]:
        window: list[T] = []
        gone = ""  # why nothing of the last window could be sent
        for item in items:
            if isinstance(item, StoreResult):
                yield item
                continue
            if gone:
                raise PeerError(f"{gone}; the rest was not tried")
            window.append(item)
            if len(window) == WINDOW:
                gone = yield from self._window(window)
                window = []
        if window:
            yield from self._window(window)

    def _window(self, window: Sequence[T]) -> Generator[StoreResult, None, str]:
        """The results of a window; returns why the peer did not answer for any of it, "" where it did."""
        answered, reason = False, ""
        for number in range(self.tries):
            if number:
                self.sleep(BACK_OFF_S[min(number, len(BACK_OFF_S)) - 1])
            again: list[T] = []
            for outcome in self._once(window):
                answered = answered or not outcome.lost
                reason = outcome.reason
                if number + 1 < self.tries and (outcome.lost or (outcome.status or 0) in OUT_OF_RESOURCES):
                    again.append(outcome.instance)
                else:
                    yield self._result(outcome)
            window = again
            if not window:
                break
        return "" if answered else reason

    def _once(self, window: Sequence[T]) -> Iterator[Outcome[T]]:
        delivery = Delivery(
            settings=self.settings, read=self.read, converter=self.converter, connect=connect, origin={}
        )  # fmt: skip
        for proposed, group in groups(
            window, convert=self.converter is not None, preferred=preferred_by(self.peer) if self.converter else ()
        ):
            yield from delivery.to_peer(self.peer, proposed, group)

    def _result(self, outcome: Outcome[T]) -> StoreResult:
        name, reason = self.name(outcome.instance), outcome.reason
        if outcome.status is not None:
            error = reason if outcome.status != SUCCESS else ""
            return StoreResult(name, outcome.status, error, outcome.instance.dataset_length)
        return StoreResult(name, None, reason if describe(self.peer) in reason else f"{describe(self.peer)}: {reason}")


def _look_at(path: Path) -> _File | StoreResult:
    """What the file is, by its first bytes."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            found = identify(file.read(PREFIX), size=size)
    except OSError as error:
        return StoreResult(path, None, f"cannot be read: {error.strerror}")
    if not (found.SOPClassUID and found.SOPInstanceUID and found.TransferSyntaxUID):
        return StoreResult(path, None, "not a DICOM instance: no SOP Class UID, SOP Instance UID or transfer syntax")
    offset = found.dataset_offset
    return _File(path, found.SOPClassUID, found.SOPInstanceUID, found.TransferSyntaxUID, offset, size - offset)


class _Files:
    """The data sets of files, each opened when it is its turn."""

    def __init__(self, files: Sequence[_File]) -> None:
        self._files = iter(list(files))

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        return None

    def next(self) -> Iterator[memoryview]:
        """The bytes of the next file; raises StorageError where it went away or became shorter."""
        file = next(self._files)
        return map(memoryview, FileRange(file.path, file.dataset_offset, file.dataset_length).chunks())
