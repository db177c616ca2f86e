"""Whether the bytes of an identifier are a data set, before anything is made of them (PS3.5 clause 7).

A key that is cut must not be obeyed: `1.2.3` that should have been `1.2.34` is another study, and a key without a value
asks for everything. Libraries for files take what is there and go on.
"""

from __future__ import annotations

import struct
from typing import Final, Literal

from sphere.conf.errors import QueryError
from sphere.ingest.header.dictionary import ITEM, ITEM_END, SEQUENCE_END, UNDEFINED, label, standard_vr
from sphere.ingest.header.element import VRS, Encoding, Head, read_head
from sphere.ingest.header.values import BINARY_VRS, NUMBERS

MAX_DEPTH: Final = 32  # sequences within sequences
_SIZES: Final = {  # bytes of one value (PS3.5 Table 6.2-1)
    **{vr: struct.calcsize(f"<{code}") for vr, code in NUMBERS.items()},
    **dict.fromkeys(("US or SS", "US or OW", "US or SS or OW"), 2),
    "AT": 4,
}
_OPEN: Final = BINARY_VRS | {""}  # said where the sender does not know better
_LETTERS: Final = range(0x41, 0x5B)


def misfit(said: str, known: str, length: int) -> str:
    """What is wrong with a value of `length` bytes whose VR is `said` and by PS3.6 `known` ("" where there is none).

    "" where nothing is. Text of an odd length is no harm.
    """
    for vr in (said, known):
        if length % _SIZES.get(vr, 1):
            return f"{length} bytes are no values of {vr}"
    if length and not {said, known} & _OPEN and _kind(said) != _kind(known):
        return f"has VR {said}, which is not {known}"
    return ""


def _kind(vr: str) -> str:
    return "SQ" if vr == "SQ" else "number" if vr in _SIZES else "text"


def is_explicit(data: bytes, at: int, assumed: bool) -> bool:
    """How the data set at `at` is written, by its first element: some peers do not keep to what was negotiated."""
    vr = data[at + 4 : at + 6]
    return vr[0] in _LETTERS and vr[1] in _LETTERS if len(vr) == 2 else assumed


def check(data: bytes, encoding: Encoding) -> None:
    """Raise QueryError, with the element at fault where it is known, unless `data` is whole.

    Wrong are an element that is cut or says more bytes than there are, an unknown VR, a length that is no multiple of
    its VR's, an element that comes twice, and what is no item where one has to be.
    """
    _Check(data, encoding.little).elements(0, len(data), is_explicit(data, 0, encoding.explicit), 0)


class _Check:
    """One walk over `data`."""

    def __init__(self, data: bytes, little: bool) -> None:
        self._data = data
        self._encodings = {explicit: Encoding(explicit=explicit, little=little) for explicit in (False, True)}
        self._depth = 0

    def elements(self, at: int, end: int, explicit: bool, owner: int = 0, *, open_item: bool = False) -> int:
        """The position after a data set: at `end`, or that of an item of undefined length of the sequence `owner`."""
        seen: set[int] = set()
        while at < end:
            head = self._head(at, end, explicit, owner)
            at += head.size
            if head.tag == ITEM_END and open_item:
                return at
            if head.tag >> 16 == 0xFFFE:
                raise _wrong(owner or head.tag, "an item where none can be")
            if head.tag in seen:
                raise _wrong(head.tag, "comes twice")
            seen.add(head.tag)
            at = self._value(head, at, end, explicit)
        if open_item:
            raise _wrong(owner, "an item has no end")
        return at

    def _value(self, head: Head, at: int, end: int, explicit: bool) -> int:
        known = standard_vr(head.tag)
        if head.length == UNDEFINED:
            if {head.vr, known} - {"SQ", "UN", ""}:
                raise _wrong(head.tag, "has no length")
            return self._sequence(head.tag, at, end, explicit)
        if head.length > end - at:
            raise _wrong(head.tag, f"says {head.length} bytes where {end - at} are")
        if problem := misfit(head.vr, known, head.length):
            raise _wrong(head.tag, problem)
        after = at + head.length
        if "SQ" in (head.vr, known) and head.length:
            self._sequence(head.tag, at, after, explicit, closed=True)
        return after

    def _sequence(self, tag: int, at: int, end: int, explicit: bool, *, closed: bool = False) -> int:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _wrong(tag, "sequences are nested too deeply")
        while at < end or not closed:
            item = self._head(at, end, explicit, tag)
            at += item.size
            if item.tag == SEQUENCE_END and not closed:
                break
            if item.tag != ITEM:
                raise _wrong(tag, "has something that is no item")
            inner = explicit and is_explicit(self._data, at, assumed=True)
            if item.length == UNDEFINED:
                at = self.elements(at, end, inner, tag, open_item=True)
            elif item.length > end - at:
                raise _wrong(tag, f"an item says {item.length} bytes where {end - at} are")
            else:
                at = self.elements(at, at + item.length, inner, tag)
        self._depth -= 1
        return at

    def _head(self, at: int, end: int, explicit: bool, owner: int) -> Head:
        data = self._data
        if explicit and not is_explicit(data, at, assumed=True):
            explicit = False  # one element without a VR among others, as some write private ones
        head = read_head(data, at, self._encodings[explicit], end - at)
        if head is None or at + head.size > end:
            raise _wrong(self._tag(at, end) or owner, "ends before its length")
        if explicit and head.tag >> 16 != 0xFFFE and data[at + 4 : at + 6] not in VRS:
            raise _wrong(head.tag, "has a VR that is none of PS3.5")
        return head

    def _tag(self, at: int, end: int) -> int:
        """The tag of a head that is cut, 0 where that is cut too."""
        order: Literal["little", "big"] = "little" if self._encodings[True].little else "big"
        group, element = self._data[at : at + 2], self._data[at + 2 : at + 4]
        return int.from_bytes(group, order) << 16 | int.from_bytes(element, order) if end - at >= 4 else 0


def _wrong(tag: int, problem: str) -> QueryError:
    """Without any value: those may name patients."""
    if not tag:
        return QueryError(f"identifier {problem}")
    return QueryError(f"{label(tag)}: {problem}", offending=(tag,))
