"""What was already decoded: the instances of a series repeat most of their elements byte for byte."""

from __future__ import annotations

from typing import Final

from sphere.ingest.header.charset import Charset
from sphere.ingest.header.element import Encoding
from sphere.ingest.header.values import Hit

MEMO_LIMIT: Final = 1024  # bytes of the largest element remembered
_MAX_ENTRIES: Final = 40_000  # elements remembered in all; about 20 MB

_Key = tuple[Encoding, tuple[str, ...], bool]


class Context:
    """What an element's bytes mean: encoding, character sets and, where the VR hangs on it, PixelRepresentation.

    ``lengths`` maps the first 8 bytes of an element to its whole length in bytes where those 8 bytes settle it, to 0
    where the first 12 do (then they are a key as well). ``hits`` maps a whole element to what it was decoded to. Only
    elements that mean the same wherever they stand in such a context are in them.
    """

    __slots__ = ("charset", "encoding", "hits", "lengths", "memo", "signed")

    def __init__(self, memo: Memo, encoding: Encoding, charset: Charset, *, signed: bool) -> None:
        self.memo = memo
        self.encoding = encoding
        self.charset = charset
        self.signed = signed
        self.lengths: dict[bytes, int] = {}
        self.hits: dict[bytes, Hit] = {}

    def using(self, *, charset: Charset | None = None, signed: bool | None = None) -> Context:
        """The context that differs from this one as said."""
        return self.memo.context(
            self.encoding,
            self.charset if charset is None else charset,
            signed=self.signed if signed is None else signed,
        )

    def written(self, encoding: Encoding) -> Context:
        """The same context for elements in another encoding (PS3.5 6.2.2)."""
        return self.memo.context(encoding, self.charset, signed=self.signed)

    def remember(self, raw: bytes, hit: Hit) -> None:
        """Keep what an element was decoded to."""
        self.hits[raw] = hit


class Memo:
    """All contexts of one reader, bounded: everything is forgotten when it grows too large."""

    def __init__(self) -> None:
        self._contexts: dict[_Key, Context] = {}

    def context(self, encoding: Encoding, charset: Charset, *, signed: bool = False) -> Context:
        """The one context of these properties."""
        key = (encoding, charset.encodings, signed)
        context = self._contexts.get(key)
        if context is None:
            context = self._contexts[key] = Context(self, encoding, charset, signed=signed)
        return context

    def trim(self) -> None:
        """Forget everything once there is too much of it; called between instances."""
        if sum(len(context.hits) + len(context.lengths) for context in self._contexts.values()) > _MAX_ENTRIES:
            self._contexts.clear()
