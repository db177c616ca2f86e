"""Fuzz targets of what browsers and scripts send: parts of multipart/related (RFC 2046 5.1), and parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Final
from unittest.mock import patch

from starlette.exceptions import HTTPException

from sphere.scp.web import multipart_in
from sphere.scp.web.accept import MediaRange, choose, parse
from sphere.scp.web.multipart_in import Data, End, Head, MultipartReader
from sphere.scp.web.problem import WebError
from sphere.scp.web.ranges import named
from sphere.scp.web.render import MAX_SIDE, fitted_size, parse_look

BOUNDARY: Final = "B-1"
MAX_HEAD: Final = 96  # bytes; both limits are so small that short inputs reach them
MAX_PREAMBLE: Final = 200  # bytes
HELD: Final = MAX_HEAD + MAX_PREAMBLE  # bytes that a reader may keep, beside the piece that it was given
OFFERED: Final = ("image/jpeg", "image/png", "image/gif")

Part = tuple[tuple[tuple[str, str], ...], bytes]


def multipart(data: bytes) -> None:
    """A body is taken apart into the same parts, or refused with the same words, however it comes in pieces.

    The first byte says what the rest is: a body as it is (0), the texts of parts and their headers, separated by 0x1E,
    of which a valid body is made that must give them back (1), or a list of media types (2). The second says where
    pieces end.
    """
    if len(data) < 2:
        return
    kind, rest = data[0] % 3, data[2:]
    if kind == 2:
        _media_types(rest.decode("latin-1"))
        return
    with patch.multiple(multipart_in, MAX_HEAD=MAX_HEAD, MAX_PREAMBLE=MAX_PREAMBLE):
        if kind == 1:
            body, expected = _valid(rest)
            assert _read([body]) == (expected, ""), "a valid body is not what it was made of"
        else:
            body = rest
        whole = _read([body])
        assert sum(len(content) for _, content in whole[0]) <= len(body)
        assert _read(body[at : at + 1] for at in range(len(body))) == whole, "byte by byte it is another body"
        assert _read(_cut(body, data[1])) == whole, "in pieces it is another body"


def _valid(texts: bytes) -> tuple[bytes, list[Part]]:
    """A body of parts, and they; odd texts are names and values of headers, as far as they are such."""
    delimiter = f"--{BOUNDARY}".encode()
    body, parts = b"", []
    for text, content in pairwise([b"", *texts.split(b"\x1e")[:20]]):
        value = text.decode("latin-1")[:40].translate({ord("\r"): " ", ord("\n"): " "}).strip()
        content = content.replace(delimiter, b"")
        if delimiter in content:  # what was taken out had one around it
            continue
        headers = ((("x-text", value),)) if text else ()
        head = "".join(f"X-Text: {value}\r\n" for _, value in headers).encode("latin-1")
        body += b"\r\n" + delimiter + b" " * (len(content) % 3) + b"\r\n" + head + b"\r\n" + content
        parts.append((headers, content))
    if not parts:  # RFC 2046 5.1.1 wants one
        body, parts = delimiter + b"\r\n\r\n", [((), b"")]
    return body + b"\r\n" + delimiter + b"--\r\nmore", parts


def _cut(body: bytes, at: int) -> Iterator[bytes]:
    """Pieces of 1 to 1 + `at` bytes."""
    place, size = 0, 1 + at
    while place < len(body):
        yield body[place : place + size]
        place, size = place + size, 1 + (size * 7 + place) % (1 + at)


def _read(pieces: Iterable[bytes]) -> tuple[list[Part], str]:
    """What is in a body, and why it is refused, if it is."""
    reader, parts, opened = MultipartReader(BOUNDARY), [], False
    try:
        for piece in pieces:
            for event in reader.feed(piece):
                if isinstance(event, Head):
                    assert not opened
                    parts.append((tuple(event.headers.items()), b""))
                    opened = True
                elif isinstance(event, Data):
                    assert opened and event.data
                    parts[-1] = (parts[-1][0], parts[-1][1] + event.data)
                else:
                    assert isinstance(event, End) and opened
                    opened = False
            assert len(reader._buffer) <= HELD + len(piece), "more is kept than was said"
        reader.close()
        assert not opened
    except WebError as error:
        assert error.http == 400
        return parts, str(error)
    return parts, ""


def _media_types(text: str) -> None:
    """Media types are read or refused; the most wanted come first."""
    try:
        found = parse(text)
    except WebError as error:
        assert error.http in (400, 406)
        return
    assert all("/" in one.type and 0 <= one.quality <= 1 for one in found)
    assert [one.quality for one in found] == sorted((one.quality for one in found), reverse=True)


def parameters(data: bytes) -> None:
    """What a rendered resource, a range of bytes or an Accept header asks for is within its limits, or refused.

    The first byte says what the rest is: a viewport (0), a window (1), a Range (2) or an Accept header (3). The next
    four are columns and rows of the image, or how many bytes there are.
    """
    if len(data) < 5:
        return
    kind, width, height = data[0] % 4, 1 + int.from_bytes(data[1:3], "big"), 1 + int.from_bytes(data[3:5], "big")
    text = data[5:].decode("latin-1")
    try:
        if kind == 0:
            _viewport(text, width, height)
        elif kind == 1:
            parse_look({"window": text})
        elif kind == 2:
            start, end = named(text, width * height)
            assert 0 <= start < end <= width * height
        else:
            assert choose(parse(text) or [MediaRange("*/*")], OFFERED) in OFFERED
    except WebError as error:
        assert error.http in (400, 406)
    except HTTPException as error:
        assert (kind, error.status_code) == (2, 416)


def _viewport(text: str, width: int, height: int) -> None:
    """What becomes of an image of so many pixels is in the viewport, and has the shape of the region."""
    look = parse_look({"viewport": text})
    columns, rows = fitted_size(width, height, look)
    if look.viewport is None:
        assert (columns, rows) == (width, height)
        return
    assert 1 <= columns <= max(1, look.viewport[0]) <= MAX_SIDE
    assert 1 <= rows <= max(1, look.viewport[1]) <= MAX_SIDE
    if look.region:
        left, top, across, down = look.region
        assert 0 <= left < width and 0 <= top < height
        assert left + abs(across) <= width and top + abs(down) <= height
