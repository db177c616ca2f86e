"""The data dictionary (PS3.6, and known private ones) for the header reader: cheap look-ups that never raise."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from pydicom.datadict import dictionary_keyword, dictionary_VR, private_dictionary_VR

UNDEFINED: Final = 0xFFFFFFFF  # a value length that is not known beforehand (PS3.5 7.1.1)
ITEM: Final = 0xFFFEE000
ITEM_END: Final = 0xFFFEE00D
SEQUENCE_END: Final = 0xFFFEE0DD
PIXEL_DATA: Final = frozenset((0x7FE00008, 0x7FE00009, 0x7FE00010))

# Which VR an attribute of several has in implicit VR (PS3.5 A.1); US or SS hangs on PixelRepresentation.
_AMBIGUOUS: Final = {"OB or OW": "OW", "US or OW": "OW", "US or SS or OW": "OW"}

_known: dict[int, str] = {}


def standard_vr(tag: int) -> str:
    """The VR of PS3.6, "US or SS" included, UL for a group length; "" for a tag that is not there."""
    vr = _known.get(tag)
    if vr is None:
        try:
            vr = dictionary_VR(tag)
        except KeyError:
            return "UL" if tag & 0xFFFF == 0 else ""
        vr = _known[tag] = _AMBIGUOUS.get(vr, vr)
    return vr


@lru_cache(maxsize=4096)
def private_vr(tag: int, creator: str) -> str:
    """The VR of a private element: LO for a private creator, "" where nobody knows it."""
    if 0x10 <= tag & 0xFFFF <= 0xFF:
        return "LO"
    if not creator:
        return ""
    try:
        return _AMBIGUOUS.get(vr := private_dictionary_VR(tag, creator), vr)
    except KeyError:
        return ""


def label(tag: int) -> str:
    """The tag as warnings name it: "(gggg,eeee) Keyword"."""
    try:
        keyword = dictionary_keyword(tag)
    except KeyError:
        keyword = "private" if tag >> 16 & 1 else "unknown"
    return f"({tag >> 16:04X},{tag & 0xFFFF:04X}) {keyword}"
