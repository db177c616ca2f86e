"""What a request accepts (RFC 9110 12.5.1, PS3.18 8.7): media ranges with parameters and quality values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from starlette.requests import Request

from sphere.scp.web.problem import WebError

_BLANKS = r"\s{0,64}"  # no more in a row: a longer row could be shared out between two of these in too many ways
_ITEM = re.compile(
    rf'{_BLANKS}(?:([^\s;,"=]+){_BLANKS}(?:={_BLANKS}(?:"((?:[^"\\]|\\.)*)"|([^\s;,"]*)))?)?{_BLANKS}(?=[;,]|$)'
)
MAX_RANGES = 50


@dataclass(frozen=True, slots=True)
class MediaRange:
    """One of the media types that are accepted, its names in lower case."""

    type: str
    parameters: Mapping[str, str] = field(default_factory=dict)
    quality: float = 1.0

    def covers(self, media_type: str) -> bool:
        """Whether a media type is in the range, parameters left aside."""
        mine, theirs = self.type.partition("/"), media_type.partition("/")
        return mine[0] in ("*", theirs[0]) and mine[2] in ("*", theirs[2])

    @property
    def specific(self) -> int:
        """How much it says (RFC 9110 12.5.1), parameters left aside: nothing, the kind, or the media type."""
        kind, _, name = self.type.partition("/")
        return (kind != "*") + (name != "*")


def parse(text: str) -> list[MediaRange]:
    """Media ranges by quality, then in the order in which they stand; raises WebError where they cannot be read."""
    found: list[MediaRange] = []
    for item in _split(text):
        if item:
            found.append(_range(item))
    if len(found) > MAX_RANGES:
        raise WebError("Accept has too many media types", http=406)
    return sorted(found, key=lambda one: -one.quality)


def _split(text: str) -> list[list[tuple[str, str]]]:
    items: list[list[tuple[str, str]]] = [[]]
    at = 0
    while at < len(text):
        match = _ITEM.match(text, at)
        if match is None:
            raise WebError(f"a list of media types cannot be read: {text[:100]!r}")
        if match[1]:
            value = re.sub(r"\\(.)", r"\1", match[2]) if match[2] is not None else match[3] or ""
            items[-1].append((match[1], value))
        at = match.end()
        if at < len(text):
            if text[at] == ",":
                items.append([])
            at += 1
    return items


def _range(item: list[tuple[str, str]]) -> MediaRange:
    (name, value), *rest = item
    parameters = {key.lower(): text for key, text in rest}
    quality = parameters.pop("q", "1")
    if value or "/" not in name or not re.fullmatch(r"[01](\.[0-9]{0,3})?", quality):
        raise WebError(f"{name!r} is no media type with parameters")
    return MediaRange(name.lower(), parameters, min(1.0, float(quality)))


def accepted(request: Request) -> list[MediaRange]:
    """What the Accept header and the `accept` parameter (PS3.18 8.3.3.1) ask for; anything where they say nothing."""
    texts = request.query_params.getlist("accept") or request.headers.getlist("accept")
    return parse(",".join(texts)) or [MediaRange("*/*")]


def choose(ranges: Sequence[MediaRange], offered: Sequence[str]) -> str:
    """The offered media type that is wanted most, of several the one whose range stands first, then the first of them.

    What a media type weighs is the quality of the most specific range that covers it, of equals the best. Raises
    WebError (406).
    """
    named = [_named(one) for one in ranges]
    weighed: list[tuple[float, int, int]] = []
    for place, media_type in enumerate(offered):
        found = [(-one.specific, -one.quality, at) for at, one in enumerate(named) if one.covers(media_type)]
        _, quality, at = min(found, default=(0, 0.0, 0))
        if quality:
            weighed.append((quality, at, place))
    if not weighed:
        raise WebError(f"none of the accepted media types can be given; there are {', '.join(offered)}", http=406)
    return offered[min(weighed)[2]]


def _named(one: MediaRange) -> MediaRange:
    """The range of the parts' type, where a body of parts is accepted."""
    if one.type != "multipart/related":
        return one
    return MediaRange(one.parameters.get("type", "").lower() or "*/*", one.parameters, one.quality)
