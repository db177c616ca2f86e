"""Fuzz targets of what is read from bytes that landed: headers, bundles with damaged ends, journals."""

from __future__ import annotations

import tarfile
import tempfile
import zlib
from functools import cache
from pathlib import Path

import orjson

from sphere.conf.errors import BundleDamaged, RejectReason
from sphere.conf.loading import from_dict
from sphere.conf.settings import Settings
from sphere.ingest import tar
from sphere.ingest.header import Header, HeaderReader, Rejected, identify
from sphere.ingest.journal import Lines, parse, to_lines
from sphere.ingest.recovery import repair, verify
from sphere.ingest.storage import open_storage
from tests.fuzz.seeds import SYNTAXES, three_members
from tests.support.headers import DEFLATED, Source, part10

MAX_HEADER = 1 << 20
BUNDLE = "bundles/2026/02/03/fuzz.tar"
USED = HeaderReader(max_header=MAX_HEADER)  # remembers what it read, as the one of a job does


def headers(data: bytes) -> None:
    """A member is a row or has a reason, whatever the reader has read before, and wherever its prefix ends.

    The first byte says what the rest is: a data set of the transfer syntax with that number, or (4) a whole file.
    """
    if not data:
        return
    kind, rest = data[0] % (len(SYNTAXES) + 1), data[1:]
    if kind < len(SYNTAXES):
        syntax = SYNTAXES[kind]
        body = _deflated(rest) if syntax == DEFLATED else rest
        identify(body, transfer_syntax_uid=syntax, size=len(body))
        rest = part10(body, syntax=syntax)
    identity = identify(rest, size=len(rest))
    found = _read(USED, rest, 300)
    assert found == _read(HeaderReader(max_header=MAX_HEADER), rest, len(rest)), (
        "what was read before made a difference"
    )
    if isinstance(found, Rejected):
        assert found.reason != RejectReason.INTERNAL, found.detail
        return
    assert isinstance(orjson.loads(found.dataset), dict)
    assert None not in found.values.values()
    assert found.dataset_offset == identity.dataset_offset
    assert found.pixel_offset is None or found.dataset_offset <= found.pixel_offset < len(rest)


def _read(reader: HeaderReader, data: bytes, prefix: int) -> Header | Rejected:
    source = Source(data)
    found = reader.read(data[:prefix], size=len(data), fetch=source.fetch)
    assert sum(count for _, count in source.fetched) <= MAX_HEADER + len(data)
    return found


def _deflated(data: bytes) -> bytes:
    stream = zlib.compressobj(1, wbits=-zlib.MAX_WBITS)
    return stream.compress(data) + stream.flush()


def bundles(data: bytes) -> None:
    """Recovery keeps every complete member that stands before the damage, and what it leaves is sound.

    The first byte gives how many members of a good bundle come first; the second, what the rest is: the tar's next
    bytes (0), a member's length in 8 bytes and the records of its extended header (1), either of them to be repaired
    where it is odd, or a journal (2).
    """
    if len(data) < 2:
        return
    kept, mode, tail = data[0] % 4, data[1] // 2 % 3, data[2:]
    if mode == 2:
        _journal(tail)
        return
    if mode == 1:
        tail = _member(int.from_bytes(tail[:8], "big", signed=True), tail[8:])
    good, members = _good()
    bundle = good[: _end(kept)] + tail
    found = tar.scan(lambda offset, length: bundle[offset : offset + length], len(bundle))
    assert found.members[:kept] == members[:kept]
    ends = [0, *(member.end for member in found.members)]
    assert ends == sorted(set(ends)) and ends[-1] == found.good <= len(bundle)
    for member in found.members:
        assert member.offset <= member.offset + member.length <= member.end
    if data[1] % 2:
        _repaired(bundle, kept)


def _member(length: int, pax: bytes) -> bytes:
    """A member whose headers have right checksums, which chance would not find."""
    extended, plain = tarfile.TarInfo("extended"), tarfile.TarInfo("1.2.3.dcm")
    extended.type, extended.size, plain.size = tarfile.XHDTYPE, len(pax), length
    headers = [info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape") for info in (extended, plain)]
    return headers[0] + pax + tar.padding(len(pax)) + headers[1] + bytes(tar.BLOCK)


def _repaired(bundle: bytes, kept: int) -> None:
    settings = _archive()
    storage = open_storage(settings.storage.root)
    storage.write(BUNDLE, bundle)
    try:
        done = repair(storage, settings.archive.state_dir, BUNDLE)
    except BundleDamaged:
        assert storage.read(BUNDLE) == bundle, "nothing is changed where it cannot be told what was written"
    else:
        assert done.members >= kept
        if done.members:
            assert verify(storage, BUNDLE).problems == ()
            assert storage.read(BUNDLE)[: _end(kept)] == bundle[: _end(kept)]
    finally:
        storage.delete(BUNDLE)
        storage.delete(BUNDLE.replace(".tar", ".journal"))


def _end(kept: int) -> int:
    return _good()[1][kept - 1].end if kept else 0


def _journal(data: bytes) -> None:
    """Complete lines are records or damage; read on from any line end they are the same."""
    try:
        lines = parse(data, BUNDLE)
    except BundleDamaged:
        return
    assert isinstance(lines, Lines) and lines.next_byte <= len(data)
    if lines.sealed is not None:
        assert lines.sealed.members >= 0 and lines.sealed.size >= 0
    again = parse(to_lines(lines.records, lines.sealed), BUNDLE)
    assert (again.records, again.sealed) == (lines.records, lines.sealed)


@cache
def _good() -> tuple[bytes, list[tar.TarMember]]:
    """A sealed bundle of three members."""
    data, _ = three_members()
    return data, tar.scan(lambda offset, length: data[offset : offset + length], len(data)).members


@cache
def _archive() -> Settings:
    memory = Path("/dev/shm")  # where a sync costs nothing
    return from_dict({}, base=Path(tempfile.mkdtemp(prefix="sphere-fuzz-", dir=memory if memory.is_dir() else None)))
