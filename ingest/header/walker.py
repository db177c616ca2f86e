"""Following the elements of one data set, whatever state it is in (PS3.5 clause 7)."""

from __future__ import annotations

from collections.abc import Iterable
from operator import lt
from typing import Any, Final, NamedTuple

from pydicom.datadict import tag_for_keyword

from sphere.conf.errors import RejectReason
from sphere.ingest.header.columns import FUNCTIONAL_GROUPS
from sphere.ingest.header.dictionary import (
    ITEM,
    ITEM_END,
    PIXEL_DATA,
    SEQUENCE_END,
    UNDEFINED,
    label,
)
from sphere.ingest.header.element import HEAD, Head, inner_encoding, read_head, skip_undefined
from sphere.ingest.header.meaning import allow, fresh, resolve, turn
from sphere.ingest.header.memo import MEMO_LIMIT, Context
from sphere.ingest.header.values import BINARY_VRS, INLINE_LIMIT, Hit, bulk_hit, element_hit, member
from sphere.ingest.header.window import HeaderTooLarge, Window

MAX_DEPTH: Final = 32  # sequences within sequences that are followed
MAX_WARNINGS: Final = 100  # kept for one instance
UNORDERED: Final = "elements are not in the order of their tags"
_MAX_ELEMENTS: Final = 100_000  # of one data set, items not counted; real ones have less than 5,000
_SHARED_GROUPS: Final = 0x52009229  # SharedFunctionalGroupsSequence (PS3.3 C.7.6.16)
_MACROS: Final = {tag_for_keyword(group.name): frozenset(group.keywords) for group in FUNCTIONAL_GROUPS}

_PADDING: Final = 0xFFFCFFFC  # DataSetTrailingPadding, without significance (PS3.10 7.2)
_BEHIND: Final = frozenset((0xFFFAFFFA, _PADDING))  # and private elements (PS3.6)

_STOP: Final = -1  # no further element here; `Walker._after` says where its container goes on
_LOST: Final = -2  # nobody knows where its container goes on


class _Place(NamedTuple):
    """Where elements stand: depth of sequences, the functional group sequence around them, whether the item is open,
    whether they are behind the pixel data.

    An open item is one of undefined length.
    """

    depth: int = 0
    group: int = 0
    open: bool = False
    behind: bool = False


class Walker:
    """One walk over one data set. Afterwards:

    ``warnings`` tells what was wrong (cut off after MAX_WARNINGS), ``pixel_offset`` is the position of the pixel data
    element (PS3.3 C.7.6.3.1.4), None without one, ``shared`` holds the column values of the shared functional groups,
    and ``cut`` says why the walk ended before the end of the header, None where it did not.
    """

    def __init__(self, window: Window, *, inflated: bool = False) -> None:
        self.warnings: list[str] = []
        self.pixel_offset: int | None = None
        self.shared: dict[str, Any] = {}
        self.cut: RejectReason | None = None
        self._window = window
        self._inflated = inflated
        self._after = 0
        self._switched: Context | None = None
        self._behind: tuple[int, Context] | None = None

    def walk(self, start: int, context: Context) -> list[Hit]:
        """The elements from position `start` to the end, by tag, each once.

        What stands behind pixel data that are encapsulated, or were deflated, is not looked for: it is found by way of
        every fragment alone.
        """
        hits = self._elements(start, self._window.size, context, _Place())
        if self._behind is not None:
            hits += self._trailing(*self._behind)
        return self._ordered(hits)

    # Everything below is driven by `_elements`. Its loop knows nothing but lengths and finished elements; `_step` does
    # the rest, one element at a time.

    def _elements(self, pos: int, end: int, context: Context, place: _Place) -> list[Hit]:
        window, hits = self._window, list[Hit]()
        while pos >= 0:
            buf, base = window.buf, window.base
            index = pos - base
            stop = min(len(buf), end - base)
            length_of, known, append = context.lengths.get, context.hits.get, hits.append
            if place.group == _SHARED_GROUPS or place.behind:
                stop = 0  # its sequences give columns and are read, not remembered; or each has to be looked at
            while length := length_of(buf[index : index + 8]) or length_of(buf[index : index + 12]):
                after = index + length
                if after > stop:
                    break
                raw = buf[index:after]
                hit = known(raw) or fresh(raw, context)
                if hit is None:
                    break
                append(hit)
                index = after
            pos = self._step(base + index, min(end, window.size), context, place, hits)
            if self._switched is not None:
                context, self._switched = self._switched, None
        return hits

    def _step(self, pos: int, end: int, context: Context, place: _Place, hits: list[Hit]) -> int:
        """Read the element at `pos` with care; the position of the next one, or _STOP."""
        window = self._window
        index = window.load(pos, HEAD)
        end = min(end, window.size)
        if pos >= end:
            return self._stop(end)
        if len(hits) > _MAX_ELEMENTS:
            raise HeaderTooLarge
        head = read_head(window.buf, index, context.encoding, end - pos)
        if head is None or pos + head.size > end:
            return self._tail(pos, end, place)
        group = head.tag >> 16
        if place.behind and not (group > 0x7FE0 and (group & 1 or head.tag in _BEHIND)):
            if head.tag or head.length:  # else zeros
                self._note(f"{end - pos} bytes behind the pixel data are no elements")
            return self._stop(end)
        if group == 0xFFFE:
            return self._delimiter(head, pos, end, place)
        if head.tag in PIXEL_DATA and not place.depth:
            return self._pixels(head, pos, context, hits)
        if group in (0, 2):
            return self._foreign(head, pos, end, place)
        if context.encoding.explicit and not head.vr and self._padded(pos, end, context, hits):
            return pos + 1
        return self._element(head, pos, end, context, place, hits)

    def _element(self, head: Head, pos: int, end: int, context: Context, place: _Place, hits: list[Hit]) -> int:
        value = pos + head.size
        vr = resolve(head, context)
        if head.length == UNDEFINED:
            return self._undefined(head, vr, pos, end, context, place, hits)
        if vr == "SQ":
            return self._sequence(head, pos, end, context, place, hits)
        if head.length > end - value:
            return self._overrun(head, end)
        if vr in BINARY_VRS and head.length > INLINE_LIMIT:
            hits.append(bulk_hit(head.tag, vr, offset=value, length=head.length, inflated=self._inflated))
            return value + head.length
        return self._value(head, vr, pos, context, hits)

    def _value(self, head: Head, vr: str, pos: int, context: Context, hits: list[Hit]) -> int:
        total = head.size + head.length
        index = self._window.load(pos, total)
        raw = self._window.buf[index : index + total]
        if len(raw) < total:
            return self._overrun(head, self._window.size)
        hit, turned = context.hits.get(raw), context.turns.get(raw)
        if hit is None:
            hit = element_hit(head.tag, vr, raw[head.size :], little=context.encoding.little, charset=context.charset)
            hit, turned = turn(head, raw, hit, context)
            if context.remember(raw, hit, turned=turned) and turned is None:
                allow(head, raw, context)
        self._switched = turned
        hits.append(hit)
        return pos + total

    def _sequence(self, head: Head, pos: int, end: int, context: Context, place: _Place, hits: list[Hit]) -> int:
        """A sequence of defined length; one that is short enough is remembered as a whole."""
        value = pos + head.size
        after = value + head.length
        small = head.size + head.length <= MEMO_LIMIT and not place.group and head.tag != _SHARED_GROUPS
        raw = b""
        if small:
            index = self._window.load(pos, after - pos)
            raw = self._window.buf[index : index + after - pos]
            known = context.hits.get(raw)
            if known is not None:
                hits.append(known)
                return after
        if after > end:
            self._warn(head.tag, f"{head.length} bytes do not fit into what is there")
            small, after = False, end
        encoding = context.encoding
        if head.vr == "UN":
            encoding = inner_encoding(self._window, value, encoding)
        inner = context.within(encoding)
        hit, _ = self._items(head.tag, value, after, inner, place, closed=True)
        hits.append(hit)
        if small and context.remember(raw, hit):
            allow(head, raw, context)
        return after

    def _undefined(
        self, head: Head, vr: str, pos: int, end: int, context: Context, place: _Place, hits: list[Hit]
    ) -> int:
        """An element of undefined length: a sequence, or encapsulated fragments."""
        value = pos + head.size
        index = self._window.load(value, 8)
        follower = read_head(self._window.buf, index, context.encoding, end - value)
        if vr in ("OB", "OW"):
            after = skip_undefined(self._window, value, context.encoding)
            if after is None:
                return self._lost(head.tag, "encapsulated value without end")
            hits.append(bulk_hit(head.tag, vr, offset=value, length=after - value, inflated=self._inflated))
            return after
        if vr not in ("SQ", "UN") and (follower is None or follower.tag not in (ITEM, SEQUENCE_END)):
            return self._lost(head.tag, f"undefined length with VR {vr}")
        encoding = context.encoding
        if head.vr == "UN":
            encoding = inner_encoding(self._window, value, encoding)
        inner = context.within(encoding)
        hit, end_pos = self._items(head.tag, value, end, inner, place, closed=False)
        hits.append(hit)
        if end_pos >= 0:
            return end_pos
        self.cut = self.cut or RejectReason.MALFORMED
        return self._stop(_LOST)

    def _items(self, tag: int, pos: int, end: int, context: Context, place: _Place, *, closed: bool) -> tuple[Hit, int]:
        """The items from `pos`, and the position after them; `closed` where the length of the sequence is known."""
        mark = len(self.warnings)
        items: list[bytes] = []
        if place.depth >= MAX_DEPTH:
            self._warn(tag, f"nested deeper than {MAX_DEPTH} sequences, left out")
            after = end if closed else skip_undefined(self._window, pos, context.encoding)
            pos = _LOST if after is None else after
        else:
            group = tag if tag == _SHARED_GROUPS or place.group == _SHARED_GROUPS else 0
            while (after := self._item(tag, pos, end, context, place.depth + 1, group, items, closed)) >= 0:
                pos = after
                group = 0
            pos = self._after
        warnings = tuple(self.warnings[mark:])
        del self.warnings[mark:]
        return Hit(tag, _sequence_json(tag, items), None, None, warnings), pos

    def _item(
        self,
        tag: int,
        pos: int,
        end: int,
        context: Context,
        depth: int,
        group: int,
        items: list[bytes],
        closed: bool,
    ) -> int:
        """Read one item into `items`; the position of the next one, or _STOP."""
        if closed and pos >= end:
            return self._stop(end)
        index = self._window.load(pos, 8)
        head = read_head(self._window.buf, index, context.encoding, end - pos)
        if head is not None and head.tag == SEQUENCE_END and pos + 8 <= end:
            return self._stop(end if closed else pos + 8)
        if head is None or head.tag != ITEM or pos + 8 > end:
            self._warn(tag, "something else stands where an item should begin")
            return self._stop(end if closed else _LOST)
        is_open = head.length == UNDEFINED
        item_end = end if is_open else pos + 8 + head.length
        if item_end > end:
            self._warn(tag, "an item is longer than its sequence")
            item_end = end
        hits = self._ordered(self._elements(pos + 8, item_end, context, _Place(depth, group, is_open)))
        for hit in hits:
            if hit[4] and len(self.warnings) < MAX_WARNINGS:
                self.warnings += hit[4]
        if group in _MACROS:
            self._share(hits, _MACROS[group])
        items.append(b"{" + join(hits) + b"}")
        return (self._after if is_open else item_end) if self._after != _LOST or not is_open else _STOP

    def _share(self, hits: Iterable[Hit], keywords: frozenset[str]) -> None:
        for hit in hits:
            if hit.keyword in keywords:
                self.shared.setdefault(hit.keyword, hit.value)

    def _ordered(self, hits: list[Hit]) -> list[Hit]:
        """The elements by tag; of those that stand twice the last one counts."""
        tags = [hit[0] for hit in hits]
        if all(map(lt, tags, tags[1:])):
            return hits
        unique = {hit[0]: hit for hit in hits}
        if len(unique) < len(hits):
            self._note(f"{len(hits) - len(unique)} elements stand more than once, the last one counts")
        if tags != sorted(tags):
            self._note(UNORDERED)
        return [unique[tag] for tag in sorted(unique)]

    def _trailing(self, pos: int, context: Context) -> list[Hit]:
        """The elements behind pixel data, but for padding. Whatever is wrong there costs what is there."""
        cut = self.cut
        try:
            hits = self._elements(pos, self._window.size, context, _Place(behind=True))
        except HeaderTooLarge:
            self._note("what stands behind the pixel data is too large, left out")
            hits = []
        self.cut = cut
        return [hit for hit in hits if hit.tag != _PADDING]

    def _pixels(self, head: Head, pos: int, context: Context, hits: list[Hit]) -> int:
        """The walk ends at pixel data; they are named, not read."""
        value, there = pos + head.size, self._window.size - pos - head.size
        length = head.length
        if length == UNDEFINED:
            length = max(there, 0)
        elif length > there:
            self._warn(head.tag, f"truncated, {max(there, 0)} of {length} bytes are there")
        if not self._inflated:
            self.pixel_offset = pos
            if head.length != UNDEFINED and there - length >= 8:
                self._behind = value + length, context
        vr = head.vr or {0x7FE00008: "OF", 0x7FE00009: "OD"}.get(head.tag, "OW")
        hits.append(bulk_hit(head.tag, vr, offset=value, length=length, inflated=self._inflated))
        return self._stop(self._window.size)

    def _delimiter(self, head: Head, pos: int, end: int, place: _Place) -> int:
        if place.open and head.tag == ITEM_END:
            return self._stop(pos + 8)
        if place.open and head.tag == SEQUENCE_END:
            self._note("an item ends without its delimiter")
            return self._stop(pos)
        if head.tag == ITEM or head.length:
            return self._lost(head.tag, "stands where an element should begin")
        self._note(f"a delimiter without beginning at byte {pos}")
        return pos + 8

    def _foreign(self, head: Head, pos: int, end: int, place: _Place) -> int:
        """Padding with zeros, or an element of a group that has no place in a data set."""
        if not head.tag and not head.length:
            return self._stop(_LOST if place.open else end)
        self._warn(head.tag, "does not belong into a data set, left out")
        after = pos + head.size + head.length
        if head.length == UNDEFINED or after > end:
            return self._lost(head.tag, "cannot be followed")
        return after

    def _padded(self, pos: int, end: int, context: Context, hits: list[Hit]) -> bool:
        """Whether a value of odd length was padded to an even one without counting the pad."""
        index = self._window.load(pos, HEAD + 1)
        head = read_head(self._window.buf, index + 1, context.encoding, end - pos - 1)
        if head is None or not head.vr or not hits or head.tag <= hits[-1].tag:
            return False
        self._warn(hits[-1].tag, "padding that its length does not count")
        return True

    def _overrun(self, head: Head, end: int) -> int:
        self._warn(head.tag, f"{head.length} bytes do not fit into what is there, left out")
        if end < self._window.size:
            return self._stop(end)
        self.cut = self.cut or RejectReason.TRUNCATED
        return self._stop(_LOST)

    def _tail(self, pos: int, end: int, place: _Place) -> int:
        """Fewer bytes than an element has: padding, or the place where the file was cut."""
        index = self._window.load(pos, HEAD)
        rest = self._window.buf[index : index + end - pos]
        if not any(rest):
            return self._stop(end)
        self._note(f"{len(rest)} bytes at the end are no element")
        if end >= self._window.size:
            self.cut = self.cut or RejectReason.TRUNCATED
        return self._stop(_LOST if place.open else end)

    def _lost(self, tag: int, problem: str) -> int:
        self._warn(tag, problem)
        self.cut = self.cut or RejectReason.MALFORMED
        return self._stop(_LOST)

    def _stop(self, after: int) -> int:
        self._after = after
        return _STOP

    def _warn(self, tag: int, problem: str) -> None:
        self._note(f"{label(tag)}: {problem}")

    def _note(self, text: str) -> None:
        if len(self.warnings) < MAX_WARNINGS:
            self.warnings.append(text)


def join(hits: Iterable[Hit]) -> bytes:
    """The members of a DICOM JSON object, without its braces."""
    return b",".join([hit[1] for hit in hits if hit[1]])


def _sequence_json(tag: int, items: list[bytes]) -> bytes:
    return member(tag, "SQ", b',"Value":[%s]' % b",".join(items) if items else b"")
