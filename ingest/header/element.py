"""One data element's head, in whatever way it was encoded, and skipping what is not wanted (PS3.5 clause 7)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, NamedTuple

from sphere.ingest.header.dictionary import ITEM, ITEM_END, SEQUENCE_END, UNDEFINED, standard_vr
from sphere.ingest.header.window import Window
from sphere.ingest.part10 import LONG_VRS, SHORT_VRS

VRS: Final = {vr: vr.decode("ascii") for vr in SHORT_VRS | LONG_VRS}
_LONG: Final = frozenset(VRS[vr] for vr in LONG_VRS)
HEAD: Final = 12  # bytes of the longest head
_MAX_OPEN: Final = 1_000  # sequences and items open at once


@dataclass(frozen=True, slots=True)
class Encoding:
    """How the elements of a data set are written: explicit or implicit VR, little or big endian."""

    explicit: bool
    little: bool

    @property
    def order(self) -> str:
        """The byte order in the notation of `struct`."""
        return "<" if self.little else ">"


EXPLICIT_LE: Final = Encoding(explicit=True, little=True)
EXPLICIT_BE: Final = Encoding(explicit=True, little=False)
IMPLICIT_LE: Final = Encoding(explicit=False, little=True)
IMPLICIT_BE: Final = Encoding(explicit=False, little=False)

_LAYOUT: Final = {
    little: (struct.Struct(order + "HH2sH"), struct.Struct(order + "I"))
    for little, order in ((True, "<"), (False, ">"))
}


class Head(NamedTuple):
    """Tag, VR ("" where the encoding has none or it is no known one), bytes of the head, value length in bytes."""

    tag: int
    vr: str
    size: int
    length: int


def read_head(buf: bytes, index: int, encoding: Encoding, left: int) -> Head | None:
    """The head of the element at ``buf[index]``; None where `buf` ends inside it.

    `left` is how many bytes its container has from there on: where a VR is none of PS3.5's, the reading of the length
    that fits is taken (16 bits, 32 bits, or implicit VR).
    """
    parts, u32 = _LAYOUT[encoding.little]
    if index + 8 > len(buf):
        return None
    group, element, vr, short = parts.unpack_from(buf, index)
    tag = group << 16 | element
    if not encoding.explicit or group == 0xFFFE:
        return Head(tag, "", 8, u32.unpack_from(buf, index + 4)[0])
    name = VRS.get(vr)
    if name is None:
        return _strange_head(buf, index, encoding, left, tag)
    if name not in _LONG:
        return Head(tag, name, 8, short)
    if index + 12 > len(buf):
        return None
    return Head(tag, name, 12, u32.unpack_from(buf, index + 8)[0])


def _strange_head(buf: bytes, index: int, encoding: Encoding, left: int, tag: int) -> Head:
    """A head whose VR is unknown: PS3.5 6.2 gives new VRs 32 bits, older writers put 16, some leave the VR out."""
    parts, u32 = _LAYOUT[encoding.little]
    candidates = [Head(tag, "", 8, parts.unpack_from(buf, index)[3])]
    if index + 12 <= len(buf) and buf[index + 6 : index + 8] == b"\0\0":
        candidates.insert(0, Head(tag, "", 12, u32.unpack_from(buf, index + 8)[0]))
    candidates.append(Head(tag, "", 8, u32.unpack_from(buf, index + 4)[0]))
    for head in candidates:
        follower = index + head.size + head.length
        if head.size + head.length == left:
            return head
        if head.length != UNDEFINED and follower + 8 <= len(buf):
            group, element, vr, _ = parts.unpack_from(buf, follower)
            if group << 16 | element >= tag and (vr in VRS or group == 0xFFFE):
                return head
    return candidates[0]


def inner_encoding(window: Window, pos: int, outer: Encoding) -> Encoding:
    """How the items at `pos`, the value of an element of VR UN, are written.

    PS3.5 6.2.2 says implicit VR little endian; writers that kept explicit VR or the byte order are recognised by the
    first item and the first element in it.
    """
    index = window.load(pos, 16)
    first = window.buf[index : index + 16]
    if first[:4] == b"\xff\xfe\xe0\x00":
        return EXPLICIT_BE if first[12:14] in VRS else IMPLICIT_BE
    return EXPLICIT_LE if outer.explicit and first[12:14] in VRS else IMPLICIT_LE


def skip_undefined(window: Window, pos: int, encoding: Encoding) -> int | None:
    """The position after a value of undefined length that begins at `pos`; None where it has no proper end.

    Works for sequences and for encapsulated fragments alike, and without recursion: `open_ends` are the delimiters
    still to come, outermost first, each with the encoding of what it closes.
    """
    open_ends = [(SEQUENCE_END, encoding)]
    while open_ends:
        end, encoding = open_ends[-1]
        index = window.load(pos, HEAD)
        head = read_head(window.buf, index, encoding, window.size - pos)
        if head is None or len(open_ends) > _MAX_OPEN:
            return None
        pos += head.size
        if head.tag == end:
            open_ends.pop()
        elif head.tag >> 16 == 0xFFFE or end == SEQUENCE_END:
            if head.tag != ITEM or end != SEQUENCE_END:
                return None
            if head.length == UNDEFINED:
                open_ends.append((ITEM_END, encoding))
            else:
                pos += head.length
        elif head.length == UNDEFINED:
            vr = head.vr or standard_vr(head.tag) or "UN"
            if vr not in ("SQ", "UN", "OB", "OW"):
                return None
            inner = inner_encoding(window, pos, encoding) if head.vr == "UN" else encoding
            open_ends.append((SEQUENCE_END, inner))
        else:
            pos += head.length
        if pos > window.size:
            return None
    return pos
