"""Import: files and folders into bundles, whatever they hold, each byte for byte."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import BinaryIO, Protocol

from sphere.conf.errors import SphereError
from sphere.ingest.bundle import FileRange, NewMember
from sphere.ingest.header import Identity, identify
from sphere.ingest.part10 import file_meta
from sphere.ingest.records import MemberRecord

log = logging.getLogger(__name__)

PREFIX = 64 * 1024  # bytes read to find the identifying UIDs; most headers are smaller
LONG_PREFIX = 4 * 1024 * 1024  # read once more where the first prefix did not reach them
IN_FLIGHT = 16  # files stored at once, so that they share one sync (group commit)


@dataclass(frozen=True, slots=True)
class Imported:
    """What became of one file: its record, or why it was not stored; `skipped` says it was left out on purpose: it is
    no DICOM, or stored already."""

    path: Path
    record: MemberRecord | None = None
    error: str = ""
    skipped: bool = False


class Writer(Protocol):
    """What stores a member."""

    def store(self, member: NewMember) -> MemberRecord | None:
        """Return when it is durable, None where it was stored before. Raises SphereError."""


def find_files(paths: Iterable[Path]) -> Iterator[Path]:
    """Every file of the paths, folders walked in the order of their names.

    What is missing, no regular file, or a folder that cannot be read comes as it is: `open_regular` says what it is.
    """
    for path in paths:
        yield from _walk(path) if path.is_dir() else (path,)


def _walk(path: Path) -> Iterator[Path]:
    unread: list[Path] = []
    for folder, folders, names in os.walk(path, onerror=lambda error: unread.append(Path(error.filename))):
        folders.sort()
        yield from (Path(folder) / name for name in sorted(names))
    yield from unread


def open_regular(path: Path) -> BinaryIO:
    """A file to be read; raises OSError, also where it is a pipe, a socket or a device, which may never end."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "is no regular file")
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


def import_files(
    paths: Iterable[Path],
    writer: Writer,
    *,
    memory_bytes: int,
    only_dicom: bool = False,
    admit: Callable[[NewMember], NewMember] = lambda member: member,
    clock: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
) -> Iterator[Imported]:
    """Store every file of `paths`; yields one result a file, in order, each only when it is durable.

    Files that are not DICOM are stored too (extraction puts them into quarantine with a reason), or left out with
    `only_dicom`. Files of up to `memory_bytes` are read whole, larger ones are copied in pieces. `admit` gives the
    member as it is to be stored, or raises Refused.
    """

    def store(path: Path) -> Imported:
        try:
            member = _look_at(path, memory_bytes, only_dicom, clock())
            record = writer.store(admit(member)) if member is not None else None
            return Imported(path, record, skipped=record is None)
        except OSError as error:
            return Imported(path, error=error.strerror or str(error))
        except SphereError as error:
            return Imported(path, error=str(error))

    waiting: deque[Future[Imported]] = deque()
    with ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="import") as pool:
        for path in find_files(paths):
            waiting.append(pool.submit(store, path))
            if len(waiting) >= 2 * IN_FLIGHT:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _look_at(path: Path, memory_bytes: int, only_dicom: bool, received_at: datetime) -> NewMember | None:
    """The file as a member; None where it is to be left out."""
    with open_regular(path) as file:
        status = os.fstat(file.fileno())
        size = status.st_size
        prefix = file.read(memory_bytes if size <= memory_bytes else PREFIX)
        identity = identify(prefix, size=size)
        if not identity.complete:
            prefix += file.read(LONG_PREFIX)
            identity = identify(prefix, size=size)
    if only_dicom and not identity.SOPInstanceUID:
        return None
    preamble, offset = _part10_head(prefix, identity)
    whole = len(prefix) == size
    return NewMember(
        SOPInstanceUID=identity.SOPInstanceUID,
        SOPClassUID=identity.SOPClassUID,
        StudyInstanceUID=identity.StudyInstanceUID,
        SeriesInstanceUID=identity.SeriesInstanceUID,
        TransferSyntaxUID=identity.TransferSyntaxUID,
        source_aet="",
        origin=f"import:{path.absolute()}",
        received_at=received_at,
        preamble=preamble,
        dataset=memoryview(prefix)[offset:] if whole else FileRange(path, offset, size - offset, status.st_mtime_ns),
    )


def _part10_head(prefix: bytes, identity: Identity) -> tuple[bytes, int]:
    """(what goes before the data set, where the data set begins in the file).

    A Part 10 file keeps its own preamble and File Meta Information; a bare data set that could be identified is given
    new ones (PS3.10 7.1), so that every such member is a complete file; anything else stays as it is.
    """
    offset = identity.dataset_offset
    if prefix[128:132] == b"DICM":
        return prefix[:offset], offset
    if not identity.SOPInstanceUID or not identity.TransferSyntaxUID:
        return b"", 0
    head = file_meta(
        sop_class_uid=identity.SOPClassUID,
        sop_instance_uid=identity.SOPInstanceUID,
        transfer_syntax_uid=identity.TransferSyntaxUID,
    )
    return head, offset
