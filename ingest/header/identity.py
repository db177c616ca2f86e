"""The identifying UIDs of an instance, from its first bytes: for receivers and imports, which must not wait."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from sphere.ingest.header.dictionary import PIXEL_DATA, UNDEFINED
from sphere.ingest.header.element import HEAD, inner_encoding, read_head, skip_undefined
from sphere.ingest.header.layout import Layout, find_layout
from sphere.ingest.header.window import HeaderTooLarge, InflateFailed
from sphere.ingest.part10 import LONG_VRS, SHORT_VRS

SOP_CLASS: Final = 0x00080016
SOP_INSTANCE: Final = 0x00080018
STUDY: Final = 0x0020000D
SERIES: Final = 0x0020000E
_WANTED: Final = frozenset((SOP_CLASS, SOP_INSTANCE, STUDY, SERIES))
_IN_GROUP_8: Final = frozenset((SOP_CLASS & 0xFFFF, SOP_INSTANCE & 0xFFFF))
_HEAD: Final = {order: struct.Struct(order + "HHHH").unpack_from for order in "<>"}  # VR and 16-bit length as numbers
_LONG_LENGTH: Final = {order: struct.Struct(order + "I").unpack_from for order in "<>"}


def _numbers(vrs: frozenset[bytes], order: str) -> frozenset[int]:
    return frozenset(struct.unpack(order + "H", vr)[0] for vr in vrs)


_SHORT: Final = {order: _numbers(SHORT_VRS, order) for order in "<>"}
_LONG: Final = {order: _numbers(LONG_VRS, order) for order in "<>"}
_MAX_ELEMENTS: Final = 20_000  # followed before giving up: real headers have some hundred before SeriesInstanceUID
_MAX_INFLATED: Final = 4 * 1024 * 1024  # bytes of a deflated data set looked at


@dataclass(frozen=True, slots=True)
class Identity:
    """UIDs as they stand in the bytes, the first of several, "" where absent or not within them; nothing is validated.

    ``dataset_offset`` counts bytes from the first one given. ``complete`` is True when the elements were followed to
    SeriesInstanceUID or beyond where it would be, so that more bytes would add nothing.
    """

    SOPInstanceUID: str
    SOPClassUID: str
    StudyInstanceUID: str
    SeriesInstanceUID: str
    TransferSyntaxUID: str
    dataset_offset: int
    complete: bool


def identify(prefix: bytes, *, transfer_syntax_uid: str | None = None, size: int) -> Identity:
    """Find the identifying UIDs in the first bytes of an instance of `size` bytes. Never raises on bad bytes.

    With `transfer_syntax_uid` the bytes are a bare data set (as C-STORE brings it), else a whole file. SOP class and
    instance fall back to the File Meta Information.
    """
    try:
        layout = find_layout(
            prefix,
            size=size,
            fetch=lambda offset, count: b"",
            limit=max(_MAX_INFLATED, len(prefix)),
            transfer_syntax_uid=transfer_syntax_uid,
        )
    except HeaderTooLarge:
        return Identity("", "", "", "", transfer_syntax_uid or "", 0, False)
    if not isinstance(layout, Layout):
        return Identity("", "", "", "", transfer_syntax_uid or "", 0, len(prefix) >= size)
    try:
        found, complete = _walk(layout)
    except (HeaderTooLarge, InflateFailed):
        found, complete = {}, True
    complete = complete or len(prefix) >= size
    return Identity(
        found.get(SOP_INSTANCE) or layout.meta.MediaStorageSOPInstanceUID,
        found.get(SOP_CLASS) or layout.meta.MediaStorageSOPClassUID,
        found.get(STUDY, ""),
        found.get(SERIES, ""),
        layout.TransferSyntaxUID,
        layout.dataset_offset,
        complete,
    )


def first_uid(value: bytes) -> str:
    """The UID of an element, the first where it has several: as it is read for the catalog."""
    return value.decode("latin-1").partition("\\")[0].strip("\0 ")


def _walk(layout: Layout) -> tuple[dict[int, str], bool]:
    """UIDs by tag, and whether the walk went as far as it had to."""
    found: dict[int, str] = {}
    window, pos = layout.window, layout.start
    for _ in range(_MAX_ELEMENTS):
        index = window.load(pos, HEAD)
        if layout.encoding.explicit:
            ahead = _pass_over(window.buf, index, layout.encoding.order)
            if ahead != index:
                pos += ahead - index
                continue
        head = read_head(window.buf, index, layout.encoding, window.size - pos)
        if head is None:
            return found, False
        if head.tag > SERIES or head.tag in PIXEL_DATA:
            return found, True
        pos += head.size
        if head.length == UNDEFINED:
            encoding = layout.encoding if head.vr != "UN" else inner_encoding(window, pos, layout.encoding)
            after = skip_undefined(window, pos, encoding)
            if after is None:
                return found, False
            pos = after
            continue
        if head.tag in _WANTED:
            index = window.load(pos, head.length)
            value = window.buf[index : index + head.length]
            if len(value) < head.length:
                return found, False
            found[head.tag] = first_uid(value)
            if head.tag == SERIES:
                return found, True
        pos += head.length
    return found, True


def _pass_over(buf: bytes, index: int, order: str) -> int:
    """The index of the next element from ``buf[index]`` on that may matter, or whose length is not plain."""
    unpack, long_length, short_vrs, long_vrs = _HEAD[order], _LONG_LENGTH[order], _SHORT[order], _LONG[order]
    last = len(buf) - HEAD
    while index <= last:
        group, element, vr, length = unpack(buf, index)
        if group >= 0x0020 or (group == 0x0008 and element in _IN_GROUP_8):
            break
        if vr in short_vrs:
            index += 8 + length
        elif vr in long_vrs and (length := long_length(buf, index + 8)[0]) != UNDEFINED:
            index += 12 + length
        else:
            break
    return index
