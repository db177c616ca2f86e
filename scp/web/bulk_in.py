"""The bulk data of a store request, found by what metadata say of their place (PS3.18 10.5.1.1.2, RFC 2557 5)."""

from __future__ import annotations

import re
from bisect import bisect_left
from functools import cached_property
from typing import Any, Final
from urllib.parse import urljoin

from sphere.scp.web.incoming import ArrivingBody
from sphere.scp.web.problem import WebError

MAX_LOCATIONS: Final = 16 << 20  # characters of all locations of a request
_REFERENCE = re.compile(r"([^:/?#]+:)?(//[^/?#]*)?([^?#]*)(.*)", re.DOTALL)  # RFC 3986 appendix B

Part = tuple[str, ArrivingBody]
"""Content-Type, and what came."""


class Unusable(ValueError):
    """Why metadata makes no instance; without a value of it."""


class BulkParts:
    """The parts of a request by their Content-Location; all are added before the first is looked for."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Part]] = {}
        self._named = 0

    def add(self, location: str, content_type: str, body: ArrivingBody) -> None:
        """A part; several of one location are the frames of one value. Raises WebError (413), the part then added."""
        self._parts.setdefault(location, []).append((content_type, body))
        self._named += len(location)
        if self._named > MAX_LOCATIONS:
            raise WebError(f"Content-Locations have at most {MAX_LOCATIONS >> 20} Mi characters", http=413)

    def bodies(self) -> list[ArrivingBody]:
        """All of them."""
        return [body for parts in self._parts.values() for _, body in parts]

    def find(self, uri: Any, base: str = "") -> list[Part]:
        """What a BulkDataURI of metadata whose Content-Location is `base` means; raises Unusable.

        The location that is the same, as it stands or resolved against `base`; else, of a relative reference, the one
        location whose path ends with it at the border of a segment, the query being the same. Where two could be meant
        neither is taken: the wrong pixels are worse than none.
        """
        if not isinstance(uri, str) or not uri:
            raise Unusable("a BulkDataURI is no text")
        named = {name for name in (uri, _resolved(base, uri)) if name in self._parts} or self._ending(uri)
        if not named:
            raise Unusable("bulk data that the metadata refers to is not in the request")
        if len(named) > 1:
            raise Unusable("bulk data that the metadata refers to could be several")
        return self._parts[named.pop()]

    def _ending(self, uri: str) -> set[str]:
        """At most two locations that a relative reference may mean."""
        scheme, authority, path, rest = _taken_apart(uri)
        if scheme or authority or not path:
            return set()
        whole = path.startswith("/")  # from the root: all of the path (RFC 3986 5.2.2)
        wanted = (path if whole else f"/{path}")[::-1]
        among = self._backwards.get(rest, [])
        at = bisect_left(among, (wanted, ""))
        return {
            location
            for backwards, location in among[at : at + 2]
            if (backwards == wanted if whole else backwards.startswith(wanted))
        }

    @cached_property
    def _backwards(self) -> dict[str, list[tuple[str, str]]]:
        """By query and fragment: (path from its end on, location) in order, so that those of one end are neighbours."""
        found: dict[str, list[tuple[str, str]]] = {}
        for location in self._parts:
            _, _, path, rest = _taken_apart(location)
            found.setdefault(rest, []).append((path[::-1], location))
        for paths in found.values():
            paths.sort()
        return found


def _taken_apart(reference: str) -> tuple[str, str, str, str]:
    """(scheme, authority, path, query and fragment) of a reference."""
    parts = _REFERENCE.fullmatch(reference)
    assert parts is not None
    scheme, authority, path, rest = parts.groups("")
    return scheme, authority, path, rest


def _resolved(base: str, uri: str) -> str:
    """A reference in what is at `base`; as it stands where that is no URI."""
    try:
        return urljoin(base, uri)
    except ValueError:
        return uri
