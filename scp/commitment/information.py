"""Data sets of Storage Commitment, with tens of thousands of references: read and written element by element.

pydicom makes 5 kB of each reference. PS3.4 Tables J.3-1 and J.3-2.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import Final

from pydicom.uid import UID

from sphere.conf.errors import QueryError
from sphere.ingest.header.element import Encoding, Head, read_head
from sphere.scp.commitment.transactions import Reference
from sphere.scp.decode import MAX_IDENTIFIER

TRANSACTION_UID, RETRIEVE_AE_TITLE = 0x00081195, 0x00080054
REFERENCED, FAILED = 0x00081199, 0x00081198  # sequences
CLASS, INSTANCE, FAILURE_REASON = 0x00081150, 0x00081155, 0x00081197
MAX_DEPTH = 8  # sequences within each other, in what is passed over

_UNDEFINED: Final = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD


def read_information(data: bytes, syntax: UID) -> tuple[str, tuple[Reference, ...]]:
    """Transaction UID and references of an N-ACTION; raises QueryError where the data set does not say them."""
    if syntax.is_deflated:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, MAX_IDENTIFIER + 1)
        except zlib.error:
            raise _unreadable() from None
    if len(data) > MAX_IDENTIFIER:
        raise QueryError(f"references take more than {MAX_IDENTIFIER} bytes")
    reader = _Reader(data, Encoding(explicit=not syntax.is_implicit_VR, little=syntax.is_little_endian))
    uid = ""
    references: tuple[Reference, ...] = ()
    for tag, begin, end in reader.elements(0, len(data)):
        if tag == TRANSACTION_UID:
            uid = reader.uid(begin, end)
        elif tag == REFERENCED:
            references = tuple(reader.references(begin, end))
    if not uid or not references:
        raise QueryError("TransactionUID and ReferencedSOPSequence are needed")
    return uid, references


def write_information(
    uid: str, ae_title: str, kept: Iterable[Reference], failed: Iterable[tuple[Reference, int]], syntax: UID
) -> bytes:
    """The data set of an N-EVENT-REPORT; `failed` come with their Failure Reason."""
    writer = _Writer(Encoding(explicit=not syntax.is_implicit_VR, little=syntax.is_little_endian))
    parts = [
        writer.text(RETRIEVE_AE_TITLE, b"AE", ae_title, b" "),
        writer.text(TRANSACTION_UID, b"UI", uid, b"\0"),
        writer.sequence(FAILED, [(*writer.reference(one), writer.reason(why)) for one, why in failed]),
        writer.sequence(REFERENCED, [writer.reference(one) for one in kept]),
    ]
    data = b"".join(parts)
    if not syntax.is_deflated:
        return data
    deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    data = deflate.compress(data) + deflate.flush()
    return data + b"\0" * (len(data) % 2)


class _Reader:
    """Elements of `data`; positions are bytes of it. Raises QueryError where they are none."""

    def __init__(self, data: bytes, encoding: Encoding) -> None:
        self._data, self._encoding = data, encoding
        self._texts: dict[bytes, str] = {}  # of the few SOP classes

    def elements(self, at: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Tag, begin and end of the value of each, of those of undefined length up to their delimiter."""
        while at < end:
            head = self._head(at, end)
            begin = at + head.size
            if head.length == _UNDEFINED:
                stop = self._delimiter(begin, end, 0)
                at = stop + 8
            else:
                stop = at = begin + head.length
            if at > end:
                raise _unreadable()
            yield head.tag, begin, stop

    def references(self, at: int, end: int) -> Iterator[Reference]:
        """Those of the items of a sequence."""
        for tag, begin, stop in self.elements(at, end):
            found = {what: where for what, *where in self.elements(begin, stop)}
            if tag != _ITEM or CLASS not in found or INSTANCE not in found:
                raise _unreadable()
            yield Reference(self.uid(*found[CLASS]), self.uid(*found[INSTANCE], again=False))

    def uid(self, begin: int, end: int, *, again: bool = True) -> str:
        """The text of a value, one object for all that are `again` the same."""
        raw = self._data[begin:end]
        try:
            text = raw.decode("ascii").strip("\0 ")
        except UnicodeDecodeError:
            raise _unreadable() from None
        return self._texts.setdefault(raw, text) if again else text

    def _head(self, at: int, end: int) -> Head:
        head = read_head(self._data, at, self._encoding, end - at)
        if head is None:
            raise _unreadable()
        return head

    def _delimiter(self, at: int, end: int, depth: int) -> int:
        """Where that of the sequence or item stands whose value begins at `at`."""
        while at < end and depth < MAX_DEPTH:
            head = self._head(at, end)
            if head.tag in (_ITEM_END, _SEQUENCE_END):
                return at
            at += head.size
            at = self._delimiter(at, end, depth + 1) + 8 if head.length == _UNDEFINED else at + head.length
        raise _unreadable()


class _Writer:
    def __init__(self, encoding: Encoding) -> None:
        self._explicit = encoding.explicit
        self._short = struct.Struct(encoding.order + "HH2sH")
        self._long = struct.Struct(encoding.order + "HHI")
        self._order = encoding.order

    def text(self, tag: int, vr: bytes, text: str, pad: bytes) -> bytes:
        value = text.encode("ascii", "replace")
        return self._element(tag, vr, value + pad * (len(value) % 2))

    def reason(self, status: int) -> bytes:
        return self._element(FAILURE_REASON, b"US", struct.pack(self._order + "H", status))

    def reference(self, one: Reference) -> tuple[bytes, bytes]:
        return (
            self.text(CLASS, b"UI", one.SOPClassUID, b"\0"),
            self.text(INSTANCE, b"UI", one.SOPInstanceUID, b"\0"),
        )

    def sequence(self, tag: int, items: list[tuple[bytes, ...]]) -> bytes:
        """One with its items, nothing where there are none."""
        if not items:
            return b""
        data = b"".join(part for item in items for part in self._item(sorted(item, key=self._place)))
        head = struct.pack(self._order + "HH2sHI", tag >> 16, tag & 0xFFFF, b"SQ", 0, len(data))
        return (head if self._explicit else self._long.pack(tag >> 16, tag & 0xFFFF, len(data))) + data

    def _item(self, elements: list[bytes]) -> list[bytes]:
        length = sum(map(len, elements))
        return [self._long.pack(_ITEM >> 16, _ITEM & 0xFFFF, length), *elements]

    def _place(self, element: bytes) -> int:
        """The order of elements of one group."""
        return int(struct.unpack_from(self._order + "H", element, 2)[0])

    def _element(self, tag: int, vr: bytes, value: bytes) -> bytes:
        if self._explicit:
            return self._short.pack(tag >> 16, tag & 0xFFFF, vr, len(value)) + value
        return self._long.pack(tag >> 16, tag & 0xFFFF, len(value)) + value


def _unreadable() -> QueryError:
    return QueryError("references cannot be read")
