"""The bundle's file format: POSIX pax tar (IEEE Std 1003.1, pax Interchange Format), written and scanned by blocks.

A member is an extended header (type ``x``), a ustar header, the DICOM file, and zeros up to the next 512 bytes. What
the journal holds of the member stands in the extended header's ``comment`` record as JSON: the one keyword of pax that
every reader is told to ignore (GNU tar prints a warning for each vendor keyword of each member).

A member whose bytes are gone (sphere.ingest.erasing) keeps its place: headers of the same length that say so and
nothing else of it, and zeros.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any
from zlib import adler32

import orjson

from sphere.ingest.records import Erased, Member, MemberRecord

BLOCK = 512
END = bytes(2 * BLOCK)  # end-of-archive: two blocks of zeros
FORMAT = 1  # value of "sphere" in the comment record
ERASED_NAME = "erased"  # of every member whose bytes are gone
MAX_USTAR = 8**11  # bytes of a member from which on its length needs an extended record
MAX_PAX = 1 << 20  # bytes of an extended header above which it is none of ours

_COMMENT_START = b'{"sphere":%d,' % FORMAT
_ERASED = orjson.dumps({"sphere": FORMAT, "erased": True})
_PLAIN_UID = re.compile(r"[0-9][0-9.]{0,63}")
_PAX_RECORD = re.compile(rb"(\d{1,20}) ([^=]+)=")
_PAX_SIZE = re.compile(r"\d{1,18}", re.ASCII)

Fetch = Callable[[int, int], bytes]


@dataclass(frozen=True, slots=True)
class TarMember:
    """A complete member: `start` of its headers, `offset` and `length` of its bytes, `end` of its padding."""

    start: int
    offset: int
    length: int
    end: int
    name: str
    fields: dict[str, Any]
    comment: int = 0  # bytes of the comment record's value

    @property
    def erased(self) -> bool:
        """Whether its bytes are gone."""
        return self.fields.get("erased") is True

    def record(self, bundle: str) -> Member:
        """What the journal says of it; raises ValueError, TypeError or KeyError where the comment does not."""
        if self.erased:
            place = orjson.dumps({"bundle": bundle, "offset": self.offset, "length": self.length})
            return Erased(bundle, self.offset, self.length, self.comment - len(_COMMENT_START) + len(place))
        fields = dict(self.fields)
        if fields.pop("sphere") != FORMAT:
            raise ValueError("comment record of another format")
        return MemberRecord.from_fields({**fields, "bundle": bundle, "offset": self.offset, "length": self.length})


@dataclass(frozen=True, slots=True)
class Scan:
    """A tar's complete members, where they end (`good`), and whether exactly an end-of-archive follows (`sealed`).

    `damage` says what stands after `good` when it is neither the end of the file nor an end-of-archive.
    """

    members: list[TarMember] = field(default_factory=list)
    good: int = 0
    sealed: bool = False
    damage: str = ""


def member_name(SOPInstanceUID: str, sha256: str) -> str:
    """Name in the tar: ``<SOPInstanceUID>.dcm`` for a plain UID (PS3.5 9.1), else ``<sha256>.bin``."""
    return f"{SOPInstanceUID}.dcm" if _PLAIN_UID.fullmatch(SOPInstanceUID) else f"{sha256}.bin"


def member_header(name: str, length: int, received_at: datetime, said: bytes) -> bytes:
    """The blocks that precede a member of `length` bytes: what `tarfile` would write, in a tenth of its time.

    `said` are the fields of the comment record as a JSON object, which is not empty.
    """
    comment = _COMMENT_START + said[1:]
    pax = _pax_record(b"comment", comment)
    if length >= MAX_USTAR:
        pax, length = pax + _pax_record(b"size", b"%d" % length), 0
    extended = _header_block(b"././@PaxHeader", 0, len(pax), 0, tarfile.XHDTYPE)
    plain = _header_block(name.encode("ascii"), 0o644, length, int(received_at.timestamp()), tarfile.REGTYPE)
    return b"".join((extended, pax, padding(len(pax)), plain))


def erased_header(head: bytes) -> bytes:
    """What stands in the place of the blocks `head` that precede a member once its bytes are gone: just as long, with
    nothing that was said of it but its length. Raises ValueError where `head` is not what `member_header` makes."""
    try:
        records = _pax_records(head[BLOCK : BLOCK + _header(head[:BLOCK]).size])
        length = _header(head[-BLOCK:]).size
        comment = len(records["comment"].encode())
    except (_Damaged, KeyError) as error:
        raise ValueError(f"no headers of a member ({error})") from None
    pax = _pax_record(b"comment", _ERASED.ljust(comment))
    if "size" in records:
        pax += _pax_record(b"size", records["size"].encode())
    extended = _header_block(b"././@PaxHeader", 0, len(pax), 0, tarfile.XHDTYPE)
    plain = _header_block(ERASED_NAME.encode(), 0o644, length, 0, tarfile.REGTYPE)
    blocks = b"".join((extended, pax, padding(len(pax)), plain))
    if len(blocks) != len(head):
        raise ValueError("headers of another length")
    return blocks


def _pax_record(keyword: bytes, value: bytes) -> bytes:
    """``<length> <keyword>=<value>`` and a line feed, where the length counts its own digits."""
    rest = len(keyword) + len(value) + 3
    size = rest + len(str(rest))
    size = rest + len(str(size))
    return b"%d %s=%s\n" % (size, keyword, value)


def _header_block(name: bytes, mode: int, length: int, mtime: int, kind: bytes) -> bytes:
    """One ustar header (IEEE Std 1003.1, ustar Interchange Format)."""
    head = name.ljust(100, b"\0") + b"%07o\0" % mode + b"0000000\0" * 2 + b"%011o\0%011o\0" % (length, mtime)
    tail, its_sum = _TAILS[kind]
    return head + b"%06o\0 " % ((adler32(head) - 1 & 0xFFFF) + its_sum) + tail  # the sum of up to 256 bytes (RFC 1950)


def _tail(kind: bytes) -> tuple[bytes, int]:
    """What follows the checksum, and the sum of all bytes that never differ; those of the checksum count as spaces."""
    tail = kind + bytes(100) + b"ustar\x0000" + bytes(247)
    return tail, sum(tail) + 8 * ord(" ")


_TAILS = {kind: _tail(kind) for kind in (tarfile.XHDTYPE, tarfile.REGTYPE)}


def padding(length: int) -> bytes:
    """Zeros from the end of a member of `length` bytes to the next block."""
    return bytes(-length % BLOCK)


def scan(fetch: Fetch, size: int) -> Scan:
    """Walk the headers of a tar of `size` bytes; reads no member's bytes. `fetch` takes (offset, length)."""
    members: list[TarMember] = []
    at = 0
    while at < size:
        try:
            found = _member_at(fetch, at, size)
        except _Damaged as damage:
            return Scan(members, at, False, f"at byte {at}: {damage}")
        if found is None:
            return Scan(members, at, True)
        members.append(found)
        at = found.end
    return Scan(members, at)


def digest(fetch: Fetch, member: TarMember, *, chunk: int = 1 << 20) -> str:
    """SHA-256 (hexadecimal) of the member's data set."""
    begin = member.offset + int(member.fields.get("dataset_offset", 0))
    end = member.offset + member.length
    sha = hashlib.sha256()
    for at in range(begin, end, chunk):
        sha.update(fetch(at, min(chunk, end - at)))
    return sha.hexdigest()


class _Damaged(Exception):
    """Bytes that are not a complete member of ours."""


def _member_at(fetch: Fetch, at: int, size: int) -> TarMember | None:
    """The member whose extended header begins at `at`; None at a complete end-of-archive."""
    block = _take(fetch, at, BLOCK, size)
    if not any(block):
        if size - at == len(END) and not any(_take(fetch, at, len(END), size)):
            return None
        raise _Damaged("zeros that are not an end-of-archive")
    extended = _header(block)
    if extended.type != tarfile.XHDTYPE or not 0 < extended.size <= MAX_PAX:
        raise _Damaged("no extended header")
    pax = _pax_records(_take(fetch, at + BLOCK, extended.size, size))
    plain_at = at + BLOCK + _rounded(extended.size)
    plain = _header(_take(fetch, plain_at, BLOCK, size))
    if plain.type != tarfile.REGTYPE:
        raise _Damaged("a member that is not a regular file")
    offset = plain_at + BLOCK
    length = _length(pax, plain)
    end = offset + _rounded(length)
    if end > size:
        raise _Damaged("a member that ends after the file")
    comment = len(pax.get("comment", "").encode("utf-8", "surrogateescape"))
    return TarMember(at, offset, length, end, pax.get("path", plain.name), _fields(pax, length), comment)


def _take(fetch: Fetch, at: int, length: int, size: int) -> bytes:
    data = fetch(at, length) if at + length <= size else b""
    if len(data) != length:
        raise _Damaged("a header that ends after the file")
    return data


def _header(block: bytes) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise _Damaged(f"no tar header ({error})") from None


def _length(pax: dict[str, str], plain: tarfile.TarInfo) -> int:
    """Bytes of a member; a ustar header can say that they are fewer than none (base-256 numbers)."""
    if "size" in pax and not _PAX_SIZE.fullmatch(pax["size"]):
        raise _Damaged("a size record that is no number")
    length = int(pax["size"]) if "size" in pax else plain.size
    if length < 0:
        raise _Damaged("a member of negative length")
    return length


def _fields(pax: dict[str, str], length: int) -> dict[str, Any]:
    try:
        fields = orjson.loads(pax["comment"])
        if fields.get("erased") is True:
            return dict(fields)
        offset, received_at = fields["dataset_offset"], fields["received_at"]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise _Damaged("an extended header without our comment record") from None
    if not isinstance(offset, int) or not isinstance(received_at, str):
        raise _Damaged("a comment record with values of other types")
    if not 0 <= offset <= length:
        raise _Damaged("a data set that begins outside its member")
    return dict(fields)


def _pax_records(data: bytes) -> dict[str, str]:
    records: dict[str, str] = {}
    at = 0
    while at < len(data):
        match = _PAX_RECORD.match(data, at)
        end = at + int(match[1]) if match else 0
        if match is None or end > len(data) or end <= match.end() or data[end - 1 : end] != b"\n":
            raise _Damaged("extended header records that do not add up")
        records[match[2].decode("utf-8", "replace")] = data[match.end() : end - 1].decode("utf-8", "replace")
        at = end
    return records


def _rounded(length: int) -> int:
    return length + -length % BLOCK


def utc(when: datetime) -> datetime:
    """`when` in UTC; a naive time is taken as UTC."""
    if when.tzinfo is timezone.utc:
        return when
    return when.replace(tzinfo=timezone.utc) if when.tzinfo is None else when.astimezone(timezone.utc)
