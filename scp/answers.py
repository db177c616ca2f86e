"""Encoding the identifiers of C-FIND responses (PS3.5 7.1): what columns gave directly, all else through pydicom.

pydicom takes about 0.5 ms to build and to write an identifier of ten elements; most of them are text that the query
service has as it goes onto the wire. A test holds the bytes against pydicom's.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from datetime import date
from typing import Any, Final

from pydicom.uid import UID
from pynetdicom.dsutils import encode

from sphere.catalog.answer import RETRIEVE_AE_TITLE, UTF_8, Match, decimal_text
from sphere.catalog.query import QUERY_RETRIEVE_LEVEL, SPECIFIC_CHARACTER_SET, Key
from sphere.conf.memo import remembered

_UTF_8_VRS: Final = frozenset(("LO", "LT", "PN", "SH", "ST", "UC", "UT"))
_ASCII_VRS: Final = frozenset(("AE", "AS", "CS", "DT", "TM", "UR"))
_LONG_VRS: Final = frozenset(("UC", "UR", "UT"))  # of those here, with 32 bits of length (PS3.5 7.1.2)
_SHORT_MAX = 0xFFFE

Encode = Callable[[Any], bytes]


def _text(codec: str, pad: bytes) -> Encode:
    def encoded(value: Any) -> bytes:
        text = value if type(value) is str else "\\".join("" if one is None else one for one in value)
        data = text.encode(codec)
        return data + pad if len(data) % 2 else data

    return encoded


def _converted(convert: Callable[[Any], str], pad: bytes = b" ") -> Encode:
    def encoded(value: Any) -> bytes:
        values = value if isinstance(value, list) else [value]
        data = "\\".join("" if one is None else convert(one) for one in values).encode("ascii")
        return data + pad if len(data) % 2 else data

    return encoded


@functools.lru_cache(16384)
def _day(day: date) -> str:
    return f"{day.year:04}{day:%m%d}"


def _packed(form: str) -> Encode:
    pack = struct.Struct("<" + form).pack
    return lambda value: b"".join(map(pack, value)) if isinstance(value, list) else pack(value)


_ENCODE: dict[str, Encode] = {
    **{vr: _text("utf-8", b" ") for vr in _UTF_8_VRS},
    **{vr: _text("ascii", b" ") for vr in _ASCII_VRS},
    "UI": _text("ascii", b"\0"),
    "DA": _converted(_day),
    "DS": _converted(decimal_text),
    "IS": _converted(str),
    **{
        vr: _packed(form) for vr, form in (("US", "H"), ("SS", "h"), ("UL", "I"), ("SL", "i"), ("FL", "f"), ("FD", "d"))
    },
}


_Slot = tuple[int, bytes, int, "bytes | None", Encode]
"""An element of every answer: its tag, how it begins, the bytes of its length, and its value where that is always the
same, else its encoder."""


class AnswerEncoder:
    """Encodes matches in one transfer syntax; how those of a query are laid out is kept for the next of its kind. For
    one thread."""

    def __init__(self, syntax: UID) -> None:
        self._syntax = syntax
        self._lean = syntax.is_little_endian and not syntax.is_deflated
        self._keys: tuple[Key, ...] | None = None
        self._told = ("", "")
        self._layout: tuple[_Slot, ...] = ()

    def encode(self, match: Match) -> bytes:
        """The identifier of a match. Raises ValueError where it cannot be encoded."""
        if self._lean and match.timezone is None:
            told = match.level, match.retrieve_ae_title
            if match.keys is not self._keys or told != self._told:
                self._layout = _laid_out(match.keys, *told, self._syntax.is_implicit_VR)
                self._keys, self._told = match.keys, told
            if (data := self._direct(match)) is not None:
                return data
        identifier = match.identifier()
        syntax = self._syntax
        found: bytes | None = encode(identifier, syntax.is_implicit_VR, syntax.is_little_endian, syntax.is_deflated)
        if found is None:
            raise ValueError("an identifier that cannot be encoded")
        return found

    def _direct(self, match: Match) -> bytes | None:
        """The identifier; None where something in it takes pydicom."""
        if match.header:
            return None
        parts: list[bytes] = []
        columns = match.columns
        for tag, head, width, whole, encoded in self._layout:
            value = whole
            if value is None:
                found = columns.get(tag)
                if found is None and encoded is not _unknown:
                    value = b""
                else:
                    try:
                        value = encoded(found)
                    except (ValueError, TypeError, AttributeError, struct.error):
                        return None
            size = len(value)
            if width == 2 and size > _SHORT_MAX:
                return None
            parts += (head, size.to_bytes(width, "little"), value)
        return b"".join(parts)


def _unknown(value: Any) -> bytes:
    raise ValueError("a VR that takes pydicom")


@remembered(256)
def _laid_out(keys: tuple[Key, ...], level: str, ae_title: str, implicit: bool) -> tuple[_Slot, ...]:
    """In the order of tags, how each element of every answer begins; those that all have alike are whole."""
    said = ((SPECIFIC_CHARACTER_SET, "CS", UTF_8), (QUERY_RETRIEVE_LEVEL, "CS", level))
    fixed = {tag: (vr, text) for tag, vr, text in (*said, (RETRIEVE_AE_TITLE, "AE", ae_title))}
    layout: list[_Slot] = []
    for key in keys:
        fixed.pop(key.tag, None)
        encoded = _unknown if key.is_creator else _ENCODE.get(key.vr, _unknown)
        layout.append((key.tag, *_head(key.tag, key.vr, implicit), None, encoded))
    layout += [(tag, *_head(tag, vr, implicit), _ENCODE[vr](text), _unknown) for tag, (vr, text) in fixed.items()]
    return tuple(sorted(layout, key=lambda element: element[0]))


def _head(tag: int, vr: str, implicit: bool) -> tuple[bytes, int]:
    """Tag and, where it is explicit, VR; how many bytes the length takes that follows."""
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF)
    if implicit:
        return head, 4
    return (head + vr.encode() + b"\0\0", 4) if vr in _LONG_VRS else (head + vr.encode()[:2], 2)
