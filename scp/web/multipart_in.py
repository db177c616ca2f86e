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
_REST = re.compile(rb"(--)?[ \t]*(\r\n)?")


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
        self._drop = 0  # bytes of the buffer that are no body, if no delimiter begins with them
        self._state: Literal["preamble", "head", "body", "epilogue"] = "preamble"

    def feed(self, data: bytes) -> Iterator[Event]:
        """The events that `data` completes."""
        self._buffer += data
        while self._state != "epilogue":
            if self._state == "head":
                event = self._head()
                if event is None:
                    return
                yield event
                continue
            before, found = self._to_delimiter()
            if self._state == "body":
                dropped = min(self._drop, len(before))
                before, self._drop = before[dropped:], self._drop - dropped
                if before:
                    yield Data(before)
                if found:
                    yield End()
            elif not found and len(self._buffer) > MAX_PREAMBLE:
                raise WebError("the multipart body has no part with its boundary")
            if not found:
                return
            self._state = found
        self._buffer = b""

    def close(self) -> None:
        """The body is over; raises WebError where it ended in the midst of a part."""
        if self._state != "epilogue":
            raise WebError("the multipart body ends before its closing boundary")

    def _to_delimiter(self) -> tuple[bytes, Literal["head", "epilogue"] | None]:
        """What is certainly before the next delimiter, and what follows that; None while it has not come."""
        start = 0
        while (at := self._buffer.find(self._delimiter, start)) >= 0:
            after = at + len(self._delimiter)
            rest = _REST.match(self._buffer, after)
            assert rest is not None
            if rest[1] or rest[2]:
                before, self._buffer = self._buffer[:at], self._buffer[rest.end() :]
                return before, "epilogue" if rest[1] else "head"
            if rest.end() >= len(self._buffer) - 1 and len(self._buffer) - after < 100:  # what decides has not come
                return self._kept(at), None
            start = after  # a longer word that begins like the boundary
        if self._state == "preamble":
            return b"", None
        return self._kept(max(start, len(self._buffer) - len(self._delimiter) + 1)), None

    def _kept(self, at: int) -> bytes:
        """Let go of the buffer up to `at`."""
        if self._state == "preamble":
            return b""
        before, self._buffer = self._buffer[:at], self._buffer[at:]
        return before

    def _head(self) -> Head | None:
        end = 0 if self._buffer.startswith(b"\r\n") else self._buffer.find(b"\r\n\r\n")
        if end > MAX_HEAD or (end < 0 and len(self._buffer) > MAX_HEAD):
            raise WebError(f"the headers of a part have at most {MAX_HEAD} bytes")
        if end < 0:
            return None
        lines = self._buffer[:end].decode("latin-1").split("\r\n") if end else []
        # a part without a body ends at once: its delimiter begins with the line that ends the headers
        self._buffer, self._drop = self._buffer[end + (2 if end else 0) :], 2
        self._state = "body"
        headers = {}
        for line in lines:
            name, sign, value = line.partition(":")
            if not sign or not re.fullmatch(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+", name):
                raise WebError("a part has a line among its headers that is none")
            headers[name.lower()] = value.strip()
        return Head(headers)
