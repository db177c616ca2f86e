"""Bodies of several parts, taken apart as they come (RFC 2046 5.1), in memory that does not grow with them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from sphere.scp.web.problem import WebError

MAX_HEAD: Final = 8 << 10  # bytes of the headers of a part
MAX_PREAMBLE: Final = 64 << 10  # bytes before the first part
_BOUNDARY = re.compile(rb"[0-9A-Za-z'()+_,\-./:=? ]{0,69}[0-9A-Za-z'()+_,\-./:=?]")
_PADDING: Final = 64  # spaces and tabs that may follow a delimiter
_REST = re.compile(rb"(--)?[ \t]{0,%d}(\r\n)?" % _PADDING)


@dataclass(frozen=True, slots=True)
class Head:
    """A part begins; names of headers in lower case."""

    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Data:
    """More of its body."""

    data: bytes


@dataclass(frozen=True, slots=True)
class End:
    """It is over."""


Event = Head | Data | End


class MultipartReader:
    """Fed with a body piece by piece, gives what is in it. Every error is a WebError (400)."""

    def __init__(self, boundary: str) -> None:
        encoded = boundary.encode("latin-1", "replace")
        if not _BOUNDARY.fullmatch(encoded):
            raise WebError("the boundary of the multipart body is missing or not one of RFC 2046")
        self._delimiter = b"\r\n--" + encoded
        self._buffer = b"\r\n"  # the first delimiter needs no line before it
        self._at = 0  # of the buffer, before which all is done with
        self._drop = 0  # bytes of the buffer that are no body, if no delimiter begins with them
        self._state: Literal["preamble", "head", "body", "epilogue"] = "preamble"

    def feed(self, data: bytes) -> Iterator[Event]:
        """The events that `data` completes."""
        self._buffer += data
        before = None
        while before != self._state and self._state != "epilogue":
            before = self._state
            yield from self._head() if self._state == "head" else self._text()
        self._buffer = b"" if self._state == "epilogue" else self._buffer[self._at :]
        self._at = 0

    def close(self) -> None:
        """The body is over; raises WebError where it ended in the midst of a part."""
        if self._state != "epilogue":
            raise WebError("the multipart body ends before its closing boundary")

    def _text(self) -> Iterator[Event]:
        """Preamble or body of a part, as far as it has come; after its delimiter the state is what follows that."""
        end, after, follows = self._delimited()
        if self._state == "preamble":
            # the same number decides, however the body comes in pieces
            if (end if follows else len(self._buffer) - len(self._delimiter) - _PADDING - 2) > MAX_PREAMBLE:
                raise WebError("the multipart body has no part with its boundary")
            if not follows:
                return
        else:
            dropped = min(self._drop, end - self._at)
            self._drop -= dropped
            if self._at + dropped < end:
                yield Data(self._buffer[self._at + dropped : end])
            if follows:
                yield End()
        self._at, self._state = after, follows or self._state

    def _delimited(self) -> tuple[int, int, Literal["head", "epilogue"] | None]:
        """Where what is before the next delimiter ends, where that does, and what follows it, if it has come."""
        start = self._at
        while (at := self._buffer.find(self._delimiter, start)) >= 0:
            after = at + len(self._delimiter)
            rest = _REST.match(self._buffer, after)
            assert rest is not None
            if rest[1] or rest[2]:
                return at, rest.end(), "epilogue" if rest[1] else "head"
            if rest.end() >= len(self._buffer) - 1:  # what decides has not come
                return at, at, None
            start = after  # a longer word that begins like the boundary
        certain = max(start, len(self._buffer) - len(self._delimiter) + 1)
        return certain, certain, None

    def _head(self) -> Iterator[Head]:
        """The headers of a part, if they have come."""
        at = self._at
        end = at if self._buffer.startswith(b"\r\n", at) else self._buffer.find(b"\r\n\r\n", at)
        if end - at > MAX_HEAD or (end < 0 and len(self._buffer) - at > MAX_HEAD + 3):  # 3 of its end may be there
            raise WebError(f"the headers of a part have at most {MAX_HEAD} bytes")
        if end < 0:
            return
        lines = self._buffer[at:end].decode("latin-1").split("\r\n") if end > at else []
        # a part without a body ends at once: its delimiter begins with the line that ends the headers
        self._at, self._drop = end + (2 if end > at else 0), 2
        self._state = "body"
        headers = {}
        for line in lines:
            name, sign, value = line.partition(":")
            if not sign or not re.fullmatch(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+", name):
                raise WebError("a part has a line among its headers that is none")
            headers[name.lower()] = value.strip()
        yield Head(headers)
