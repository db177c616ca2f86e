"""The page at `/`: its files, and what it may do in a browser."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Final

import orjson
from pydicom._dicom_dict import DicomDictionary  # datadict's functions answer for one tag each
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER: Final = Path(__file__).with_name("static")
PREFIX: Final = "/page/"
TYPES: Final = {
    ".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml", ".json": "application/json",
}  # fmt: skip
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""This origin alone, nothing inline: what a header holds is text, and could not run if it were more."""
SAFE: Final = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept, and asked for again with its entity tag
}


def routes() -> list[Route]:
    """The page, each of its files, and the names of attributes."""
    files = {f"{PREFIX}{file.name}": file for file in sorted(FOLDER.iterdir()) if file.suffix in TYPES}
    found = [Route(path, _constant(file.read_bytes, file.suffix)) for path, file in files.items()]
    index = _constant((FOLDER / "index.html").read_bytes, ".html")
    return [Route("/", index), Route(f"{PREFIX}dictionary.json", _constant(dictionary, ".json")), *found]


def _constant(body: Callable[[], bytes], suffix: str) -> Callable[[Request], Response]:
    """An endpoint whose answer is made when it is first asked for."""

    @lru_cache(1)
    def made() -> tuple[bytes, str]:
        data = body()
        return data, f'"{hashlib.sha256(data).hexdigest()[:32]}"'

    def endpoint(request: Request) -> Response:
        data, tag = made()
        headers = {**SAFE, "ETag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(data, headers=headers, media_type=TYPES[suffix])

    return endpoint


def dictionary() -> bytes:
    """Names of the attributes of PS3.6 by tag, as a JSON object."""
    return orjson.dumps({f"{tag:08X}": entry[2] for tag, entry in DicomDictionary.items() if entry[2]})
