"""What was already decoded: the instances of a series repeat most of their elements byte for byte."""

from __future__ import annotations

from typing import Final

from sphere.ingest.header.charset import Charset
from sphere.ingest.header.element import Encoding
from sphere.ingest.header.values import Hit

MEMO_LIMIT: Final = 1024  # bytes of the largest element remembered
_MAX_ENTRIES: Final = 40_000  # elements remembered in all; about 20 MB
_MAX_CONTEXTS: Final = 2_000
_MAX_CREATORS: Final = 32  # private creators told apart in one group

Creators = tuple[tuple[int, str], ...]  # private creators of one group: (tag of the creator element, name)
_Key = tuple[Encoding, tuple[str, ...], bool, Creators]


class Context:
    """What an element's bytes mean: encoding, character sets, private creators and, as the VR of some hangs on it,
    whether PixelRepresentation says signed.

    ``lengths`` maps the first 8 (or, where the length has 32 bits, 12) bytes of an element to its whole length in
    bytes. ``hits`` maps a whole element to what it was decoded to, ``turns`` one that changes the context to the one
    after it. Only elements that mean the same wherever they stand in such a context are in them.
    """

    __slots__ = ("bare", "charset", "creators", "encoding", "hits", "lengths", "memo", "signed", "turns")

    def __init__(self, memo: Memo, encoding: Encoding, charset: Charset, signed: bool, creators: Creators) -> None:
        self.memo = memo
        self.encoding = encoding
        self.charset = charset
        self.signed = signed
        self.creators = creators
        self.lengths: dict[bytes, int] = {}
        self.hits: dict[bytes, Hit] = {}
        self.turns: dict[bytes, Context] = {}
        self.bare: Context | None = None

    def remember(self, raw: bytes, hit: Hit, *, turned: Context | None = None) -> bool:
        """Keep what an element was decoded to and the context it leads to; False where there is no room."""
        if len(raw) > MEMO_LIMIT or self.memo.full:
            return False
        self.memo.count += 1
        self.hits[raw] = hit
        if turned is not None:
            self.turns[raw] = turned
        return True

    def using(self, *, charset: Charset | None = None, signed: bool | None = None) -> Context:
        """The context after an element that changes the character sets or PixelRepresentation."""
        return self.memo.context(
            self.encoding,
            self.charset if charset is None else charset,
            signed=self.signed if signed is None else signed,
            creators=self.creators,
        )

    def reserving(self, tag: int, name: str) -> Context:
        """The context after the private creator element `tag` (PS3.5 7.8.1); only its own group's creators count."""
        kept = tuple(known for known in self.creators if known[0] >> 16 == tag >> 16)[:_MAX_CREATORS]
        creators = (*kept, (tag, name))
        return self.memo.context(self.encoding, self.charset, signed=self.signed, creators=creators)

    def within(self, encoding: Encoding) -> Context:
        """The context at the beginning of an item; private creators hold in the data set they stand in only."""
        if encoding != self.encoding:
            return self.memo.context(encoding, self.charset, signed=self.signed)
        if not self.creators:
            return self
        if self.bare is None:
            self.bare = self.memo.context(encoding, self.charset, signed=self.signed)
        return self.bare

    def creator(self, tag: int) -> str:
        """Who defined a private element, "" where nobody says so."""
        block = tag & 0xFFFF0000 | tag >> 8 & 0xFF
        for known, name in self.creators:
            if known == block:
                return name
        return ""


class Memo:
    """All contexts of one reader, bounded: everything is forgotten when it grows too large.

    ``count`` is how many elements are remembered in all.
    """

    def __init__(self) -> None:
        self.count = 0
        self._contexts: dict[_Key, Context] = {}

    def context(
        self, encoding: Encoding, charset: Charset, *, signed: bool = False, creators: Creators = ()
    ) -> Context:
        """The one context of these properties; one that nobody keeps once there are too many."""
        key = (encoding, charset.encodings, signed, creators)
        context = self._contexts.get(key)
        if context is None:
            context = Context(self, encoding, charset, signed, creators)
            if len(self._contexts) < _MAX_CONTEXTS:
                self._contexts[key] = context
        return context

    @property
    def full(self) -> bool:
        """Whether nothing more is to be remembered before the next instance."""
        return self.count >= 2 * _MAX_ENTRIES or len(self._contexts) >= _MAX_CONTEXTS

    def trim(self) -> None:
        """Forget everything once there is too much of it; called between instances."""
        if self.count >= _MAX_ENTRIES or self.full:
            self._contexts.clear()
            self.count = 0
