"""WADO-RS frames (PS3.18 10.4.1.1.6): one or a list of them, as they lie or decoded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from sphere.scp.retrieve.outbound import syntax_of
from sphere.scp.retrieve.transcode import NATIVE, TARGETS
from sphere.scp.web.accept import MediaRange, accepted
from sphere.scp.web.archive import Archive, etag, not_modified
from sphere.scp.web.bulk import INSTANCE
from sphere.scp.web.multipart import Parts
from sphere.scp.web.operations import Operation
from sphere.scp.web.pixels import EXPLICIT, OCTETS, PixelReader, Pixels, media_type
from sphere.scp.web.problem import WebError
from sphere.scp.web.streamed import Body, Streamed

MAX_LISTED: Final = 10_000  # frames of one request


def offered(archive: Archive, reader: PixelReader) -> list[Operation]:
    """The frames of an instance."""

    def frames(request: Request) -> Response:
        return answer(archive, reader, request)

    types = (f'multipart/related; type="{OCTETS}"', 'multipart/related; type="image/jpeg"', OCTETS)
    what, path = "Frames, separated by commas", INSTANCE + "/frames/{frames}"
    return [Operation("GET", path, frames, what, "WADO-RS", types, others=(304,), in_part=True)]


def answer(archive: Archive, reader: PixelReader, request: Request) -> Response:
    """The frames in the order in which they are listed."""
    [instance] = archive.instances(request)[:1]
    pixels = reader.find(instance)
    numbers = listed(str(request.path_params["frames"]), pixels.frames)
    ranges = accepted(request)
    kind, decoded = _kind(ranges, syntax_of(instance))
    single = len(numbers) == 1 and next(one.type for one in ranges if one.quality) in (kind, OCTETS)
    tag = etag([instance], kind, decoded, single, *numbers)
    if known := not_modified(request, tag):
        return known
    request.state.found = 1
    first = _frame(reader, pixels, numbers[0], decoded=decoded)  # what fails does so before the response begins
    as_it_lies = not decoded and (bool(pixels.fragments) or syntax_of(instance) in TARGETS)
    syntax = syntax_of(instance) if as_it_lies else EXPLICIT
    part_type = f"{kind}; transfer-syntax={syntax}"
    if single:
        return Response(first, headers={"ETag": tag}, media_type=part_type)
    parts = Parts(part_type)
    if len(numbers) == 1:
        return Response(b"".join((parts.head(), first, parts.end)), headers={"ETag": tag}, media_type=parts.media_type)

    def body() -> Body:
        yield parts.head() + first
        for number in numbers[1:]:
            yield parts.head() + _frame(reader, pixels, number, decoded=decoded)
        yield parts.end

    return Streamed(body(), 200, {"ETag": tag}, parts.media_type)


def listed(text: str, frames: int) -> list[int]:
    """The numbers of a frame list; raises WebError: 400 for what is no list, 404 for a frame that is not there."""
    if not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", text, re.ASCII):
        raise WebError("frames must be numbers from 1, separated by commas")
    numbers = [int(one) for one in text.split(",")]
    if len(numbers) > MAX_LISTED:
        raise WebError(f"at most {MAX_LISTED} frames can be had at once")
    if not all(1 <= one <= frames for one in numbers):
        raise WebError(f"there are frames 1 to {frames}", http=404)
    return numbers


def _kind(ranges: Sequence[MediaRange], stored: str) -> tuple[str, bool]:
    """(media type, whether frames are decoded) by what is accepted; raises WebError (406)."""
    native, kept = stored in NATIVE, media_type(stored)
    for one in ranges:
        wanted = one.parameters.get("type", "*/*") if one.type == "multipart/related" else one.type
        syntax = one.parameters.get("transfer-syntax", "")
        covers = MediaRange(wanted.lower()).covers
        if not one.quality:
            continue
        if native and covers(OCTETS) and syntax in ("", "*", stored, *TARGETS):
            return OCTETS, False
        if not native and (covers(kept) or covers(OCTETS)) and syntax in ("*", stored):
            return kept, False
        if not native and covers(kept) and not syntax:
            return kept, False
        if not native and covers(OCTETS) and syntax in ("", *TARGETS):
            return OCTETS, True
    raise WebError(f"frames can be had as {OCTETS} or {kept} ({stored})", http=406)


def _frame(reader: PixelReader, pixels: Pixels, number: int, *, decoded: bool) -> bytes:
    if not decoded:
        return reader.stored(pixels, number)
    plain = reader.plain(pixels, number)
    size = pixels.bits // 8
    data = bytes(plain.PixelData)
    return data[:size] if len(data) == size + size % 2 else data
