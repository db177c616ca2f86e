"""Parts of a representation (RFC 9110 14): which bytes a Range header names."""

from __future__ import annotations

import re

from starlette.exceptions import HTTPException
from starlette.requests import Request


def byte_range(request: Request, tag: str, length: int) -> tuple[int, int] | None:
    """Begin and end of the one range that is asked for of `length` bytes; None for all of them.

    A range of what is another representation now (If-Range) is not looked at. Raises HTTPException (416).
    """
    text = request.headers.get("range")
    if text is None or request.method != "GET" or request.headers.get("if-range", tag) != tag:
        return None
    return named(text, length)


def named(text: str, length: int) -> tuple[int, int]:
    """Begin and end of the one range that a Range header names; raises HTTPException (416)."""
    found = re.fullmatch(r"bytes=([0-9]{0,15})-([0-9]{0,15})", text.strip(), re.ASCII)
    if not found or not (found[1] or found[2]):
        raise _refused("Range must be one range of bytes", length)
    if not found[1]:
        start, end = max(0, length - int(found[2])), length
    else:
        start, end = int(found[1]), min(length, int(found[2]) + 1 if found[2] else length)
    if start >= end:
        raise _refused(f"the range is beyond the {length} bytes that there are", length)
    return start, end


def _refused(detail: str, length: int) -> HTTPException:
    return HTTPException(416, detail, {"Content-Range": f"bytes */{length}"})
