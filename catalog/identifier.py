"""Reading a C-FIND identifier as text: every element with its VR and its value, decoded, and never raising on a value.

Values are taken as they came where pydicom has not converted them yet: conversion would refuse ranges in IS, and warn
of wild cards.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset

from sphere.catalog.as_stored import binary_text
from sphere.catalog.wellformed import misfit
from sphere.ingest.header.charset import DEFAULT, Charset, charset_of, decode
from sphere.ingest.header.dictionary import ITEM, private_vr
from sphere.ingest.header.element import EXPLICIT_LE, IMPLICIT_LE, read_head
from sphere.ingest.header.values import NUMBERS

SPECIFIC_CHARACTER_SET = 0x00080005
_CHARSET_VRS: Final = frozenset(("LO", "LT", "PN", "SH", "ST", "UC", "UT"))
_BINARY_ALIASES: Final = dict.fromkeys(("US or SS", "US or OW", "US or SS or OW"), "US")
_ITEM: Final = b"\xfe\xff\x00\xe0"
_CONTROLS: Final = frozenset(range(32)) - frozenset(b"\t\n\f\r\x1b")  # that no text has (PS3.5 6.1.3)


class Element(NamedTuple):
    """One element of an identifier: its text, with backslashes between values, or its items where it is a sequence.

    Where PS3.6 does not say its VR, or says several: `said` is the VR that it bears, "" for none and for UN, and `raw`
    has the bytes of its value, if it came as bytes.
    """

    tag: int
    vr: str
    text: str
    items: list[list[Element]] | None = None
    said: str = ""
    raw: bytes | None = None


def elements(identifier: Dataset) -> list[Element]:
    """Every element but group lengths, in the order of their tags."""
    return list(_elements(identifier, _charset(identifier, DEFAULT)))


def plain_elements(data: bytes, *, explicit: bool) -> list[Element] | None:
    """The elements of a little endian identifier without building a data set, which takes five times as long.

    None where it has anything but standard elements in their order: a sequence, a private or an unknown one, or bytes
    that can be read in more than one way.
    """
    if not explicit and data[4:6].isalpha() and data[4:6].isupper():
        return None  # pydicom takes the length of the first element for a VR
    encoding = EXPLICIT_LE if explicit else IMPLICIT_LE
    found: list[Element] = []
    charset, at, last, size = DEFAULT, 0, 0, len(data)
    while at < size:
        head = read_head(data, at, encoding, size - at)
        if head is None:
            return None
        tag, said, width, length = head
        if tag <= last or tag >= ITEM or tag >> 16 & 1 or said in ("SQ", "UN") or (explicit and not said):
            return None
        begin, last = at + width, tag
        at = begin + length
        vr = _standard_vr(tag)
        if at > size or not vr or vr in ("SQ", "UN") or (length and misfit(said, vr, length)):
            return None
        if tag & 0xFFFF:
            chosen = _chosen(vr, said) if " or " in vr else vr
            text = _raw_text(data[begin:at], chosen, charset, little_endian=True) if length else ""
            more = (None, said, data[begin:at]) if " or " in vr else ()
            found.append(Element(tag, chosen, text, *more))
            if tag == SPECIFIC_CHARACTER_SET:
                charset = charset_of(data[begin:at])
    return found


@functools.lru_cache(4096)
def _standard_vr(tag: int) -> str:
    try:
        return dictionary_VR(tag)
    except KeyError:
        return ""


def _charset(dataset: Dataset, inherited: Charset) -> Charset:
    if SPECIFIC_CHARACTER_SET not in dataset:
        return inherited
    return charset_of(_element(dataset, SPECIFIC_CHARACTER_SET, inherited).text.encode("latin-1", "replace"))


def _elements(dataset: Dataset, charset: Charset) -> Iterator[Element]:
    creators: dict[int, str] = {}  # by the private block's first tag
    for tag in sorted(dataset.keys()):
        if tag & 0xFFFF:
            element = _element(dataset, int(tag), charset, creators.get(tag & 0xFFFFFF00, ""))
            if tag >> 16 & 1 and 0x10 <= tag & 0xFFFF <= 0xFF:
                creators[tag >> 16 << 16 | (tag & 0xFF) << 8] = element.text.strip(" \0")
            yield element


def _element(dataset: Dataset, tag: int, charset: Charset, creator: str = "") -> Element:
    raw: Any = dataset.get_item(tag)  # pydicom's types leave out the RawDataElement
    known = _standard_vr(tag)
    if known != "SQ" and known and " or " not in known:
        return Element(tag, known, _text(raw, known, charset))
    said = raw.VR if raw.VR and raw.VR != "UN" else ""
    vr = _chosen(known, said) if known else said or private_vr(tag, creator) or "UN"
    value = bytes(raw.value or b"") if isinstance(raw, RawDataElement) else None
    if vr == "SQ" and (known or said or value is None or value.startswith(_ITEM)):
        items = dataset[tag].value or []
        return Element(tag, vr, "", [list(_elements(item, _charset(item, charset))) for item in items])
    if known or said or value is None:
        return Element(tag, vr, _text(raw, vr, charset), None, said, value)
    return Element(tag, vr, _likely_text(value, charset), None, said, value)


def _likely_text(value: bytes, charset: Charset) -> str:
    """A value of any VR, as far as it is text."""
    binary = set(value.rstrip(b"\0")) & _CONTROLS
    return value.decode("latin-1") if binary else _raw_text(value, "LO", charset, little_endian=True)


def _text(element: DataElement | RawDataElement, vr: str, charset: Charset) -> str:
    if isinstance(element, RawDataElement):
        return _raw_text(bytes(element.value or b""), vr, charset, element.is_little_endian)
    return _value_text(element.value)


def _chosen(known: str, said: str) -> str:
    """The VR of PS3.6; where that is one of several, the one that the element bears."""
    return said if said and said in known.split(" or ") else known


def _raw_text(value: bytes, vr: str, charset: Charset, little_endian: bool) -> str:
    if not value:
        return ""
    vr = _BINARY_ALIASES.get(vr, vr)
    order = "<" if little_endian else ">"
    if vr in NUMBERS or vr == "AT":
        text = binary_text(value, vr, order)
        if text is None:  # `sphere.catalog.wellformed` refuses it before: a key that is cut must not ask for less
            raise ValueError(f"{len(value)} bytes are no values of {vr}")
        return text
    if value.isascii() and b"\x1b" not in value:  # alike in every character set of PS3.3 C.12.1.1.2
        return value.decode("ascii")
    return decode(value, charset if vr in _CHARSET_VRS else DEFAULT, vr)[0]


def _value_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, (bytes, bytearray)):
        return bytes(value).decode("latin-1")
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return "\\".join(_value_text(one) for one in value)
    original = getattr(value, "original_string", None)  # of a DS as it was written; bytes for a PersonName
    return original if isinstance(original, str) else str(value)
