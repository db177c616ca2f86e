"""What is handed to the bundle writer, and how it is made ready to be written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson

from sphere.conf.errors import StorageError
from sphere.ingest import tar
from sphere.ingest.records import MemberRecord
from sphere.ingest.storage.base import Buffer
from sphere.ingest.storage.paths import storage_error

CHUNK = 1 << 20  # bytes of a waiting file held in memory at a time
_UNKNOWN = "0" * 64  # stands for a digest until it is known


@dataclass(frozen=True, slots=True)
class FileRange:
    """A data set that waits in a local file: bytes ``[offset, offset + length)`` of `path`.

    Of a file that is not ours `mtime_ns` is its modification time, as the digest and the bytes are read one after the
    other; 0 is any.
    """

    path: Path
    offset: int
    length: int
    mtime_ns: int = 0

    def chunks(self) -> Iterator[bytes]:
        """The bytes in pieces of at most 1 MiB; raises StorageError when the file cannot be read, is shorter, or was
        written to since."""
        left = self.length
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset)
                while left:
                    data = file.read(min(left, CHUNK))
                    if not data:
                        raise StorageError(f"{self.path} ends {left} bytes early")
                    left -= len(data)
                    yield data
                if self.mtime_ns and os.fstat(file.fileno()).st_mtime_ns != self.mtime_ns:
                    raise StorageError(f"{self.path} was written to while it was stored; store it again")
        except OSError as error:
            raise storage_error(error, f"reading {self.path}") from error

    def read(self, offset: int, count: int) -> bytes:
        """Bytes ``[offset, offset + count)`` of it, fewer at its end; raises StorageError."""
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset + offset)
                return file.read(max(0, min(count, self.length - offset)))
        except OSError as error:
            raise storage_error(error, f"reading {self.path}") from error


Dataset = Buffer | Sequence[Buffer] | FileRange


@dataclass(slots=True, kw_only=True)
class NewMember:
    """An instance to be stored. Nothing changes it; it is not frozen as one of 13 fields that is takes 1 us longer.

    `preamble` is what precedes the data set in the file (PS3.10 7.1: 128 bytes, "DICM", File Meta Information), or b"".
    `dataset` is stored as it is: one buffer, its fragments in order, or a range of a local file, which is read in
    pieces of 1 MiB. `sha256` is its digest (hexadecimal) where it is known already; "" has it computed, for which a
    file is read once more. `digested`, if there is one, waits for it and gives it: another thread computes it, of a
    data set in memory. UIDs are "" where they are unknown.
    """

    SOPInstanceUID: str
    SOPClassUID: str
    StudyInstanceUID: str
    SeriesInstanceUID: str
    TransferSyntaxUID: str
    source_aet: str  # calling AE title; "" for an import
    origin: str  # "dimse:<AE title>@<address>", "web:<name>@<address>" or "import:<path>"
    received_at: datetime  # UTC; a naive time is taken as UTC
    preamble: bytes
    dataset: Dataset
    sha256: str = ""
    digested: Callable[[], str] | None = None
    collections: tuple[str, ...] = ()  # that it is catalogued in

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        if isinstance(self.dataset, FileRange):
            return len(self.preamble) + self.dataset.length
        size = len(self.preamble)
        for part in _parts(self.dataset):
            size += memoryview(part).nbytes
        return size

    def fetch(self, offset: int, count: int) -> bytes:
        """Bytes ``[offset, offset + count)`` of the file, fewer at its end; raises StorageError."""
        found: list[bytes] = []
        streamed = self.dataset if isinstance(self.dataset, FileRange) else None
        for part in (self.preamble, *_parts(self.dataset)):
            size = memoryview(part).nbytes
            if offset < size and count > 0:
                found.append(bytes(part[offset : offset + count]))
                count -= len(found[-1])
            offset = max(0, offset - size)
        if streamed is not None and count > 0:
            found.append(streamed.read(offset, count))
        return b"".join(found)


@dataclass(slots=True)
class Prepared:
    """A member with everything that does not depend on its place: tar headers, bytes, and fields of its record.

    Until `settle`, where there is `digested`, the digest in headers and fields is another one of the same length.
    """

    header: bytes
    buffers: Sequence[Buffer]  # the member's bytes; of a FileRange those before it
    streamed: FileRange | None
    length: int
    fields: dict[str, Any]
    said: bytes  # the fields in JSON
    digested: Callable[[], str] | None = None

    def settle(self) -> bytes:
        """The headers, once the digest is known; raises what computing it raised."""
        if self.digested is not None:
            self.fields["sha256"] = self.digested()
            self.digested = None
            self.said, header = _headers(self.fields, self.length)
            if len(header) != len(self.header):
                raise StorageError("tar headers whose length depends on the digest")
            self.header = header
        return self.header

    def record(self, bundle: str, start: int) -> MemberRecord:
        """Its record when its headers begin at byte `start` of `bundle`."""
        return MemberRecord(bundle=bundle, offset=start + len(self.header), length=self.length, **self.fields)

    def line(self, start: bytes, record: MemberRecord) -> bytes:
        """What `record.to_json` gives, without encoding again what its headers have; `start` is `line_start` of its
        bundle."""
        return b'%b%d,"length":%d,%b' % (start, record.offset, record.length, self.said[1:])

    @property
    def padding(self) -> bytes:
        return tar.padding(self.length)


def prepare(member: NewMember) -> Prepared:
    """Digest and headers of `member`; raises StorageError when its waiting file cannot be read."""
    streamed = member.dataset if isinstance(member.dataset, FileRange) else None
    parts = _parts(member.dataset)
    digested = None if member.sha256 else member.digested
    sha256 = member.sha256 or (_UNKNOWN if digested else _digest(streamed.chunks() if streamed else parts))
    fields: dict[str, Any] = {
        "dataset_offset": len(member.preamble),
        "SOPInstanceUID": member.SOPInstanceUID,
        "SOPClassUID": member.SOPClassUID,
        "StudyInstanceUID": member.StudyInstanceUID,
        "SeriesInstanceUID": member.SeriesInstanceUID,
        "TransferSyntaxUID": member.TransferSyntaxUID,
        "sha256": sha256,
        "received_at": tar.utc(member.received_at),
        "source_aet": member.source_aet,
        "origin": member.origin,
    }
    if member.collections:
        fields["collections"] = member.collections
    length = member.size
    said, header = _headers(fields, length)
    return Prepared(header, [member.preamble, *parts], streamed, length, fields, said, digested)


def _headers(fields: dict[str, Any], length: int) -> tuple[bytes, bytes]:
    """The fields in JSON, which they are made fit for, and the tar headers."""
    try:
        said = orjson.dumps(fields, option=orjson.OPT_UTC_Z)
    except TypeError:  # lone surrogates
        fields.update({name: _text(value) for name, value in fields.items() if isinstance(value, str)})
        said = orjson.dumps(fields, option=orjson.OPT_UTC_Z)
    name = tar.member_name(fields["SOPInstanceUID"], fields["sha256"])
    return said, tar.member_header(name, length, fields["received_at"], said)


def line_start(bundle: str) -> bytes:
    """How the journal lines of members of a bundle begin, up to their offset."""
    return b'{"bundle":%b,"offset":' % orjson.dumps(bundle)


def with_digest(member: NewMember) -> NewMember:
    """The member with its `sha256`; raises StorageError when its waiting file cannot be read."""
    if member.sha256:
        return member
    if member.digested is not None:
        return replace(member, sha256=member.digested(), digested=None)
    dataset = member.dataset
    return replace(member, sha256=_digest(dataset.chunks() if isinstance(dataset, FileRange) else _parts(dataset)))


def _parts(dataset: Dataset) -> Sequence[Buffer]:
    if isinstance(dataset, FileRange):
        return ()
    if isinstance(dataset, (bytes, bytearray, memoryview)):
        return (dataset,)
    return dataset


def _digest(parts: Sequence[Buffer] | Iterator[bytes]) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.hexdigest()


def _text(value: str) -> str:
    r"""`value` as valid Unicode: undecodable bytes of a path or a UID (lone surrogates) become \udcXX."""
    return value.encode("utf-8", "backslashreplace").decode()
