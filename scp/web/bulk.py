"""WADO-RS bulk data (PS3.18 10.4.1.1.5): the values that metadata refer to, by their places in the stored file."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl

from pydicom.uid import DeflatedExplicitVRLittleEndian
from starlette.requests import Request
from starlette.responses import Response

from sphere.catalog.service import StoredInstance
from sphere.scp.retrieve.outbound import syntax_of
from sphere.scp.retrieve.read_ahead import Range
from sphere.scp.web.accept import accepted, choose
from sphere.scp.web.archive import Archive, etag, not_modified
from sphere.scp.web.inflated import MAX_INFLATED, inflated, is_there
from sphere.scp.web.multipart import Parts
from sphere.scp.web.operations import PREFIX, Operation, parameter
from sphere.scp.web.problem import WebError
from sphere.scp.web.ranges import byte_range
from sphere.scp.web.streamed import Body, Streamed

OCTETS = "application/octet-stream"
INSTANCE = PREFIX + "/studies/{study}/series/{series}/instances/{instance}"
_PARAMETERS = (
    parameter("offset", {"type": "integer"}, "Where the value begins in the stored file."),
    parameter("inflated_offset", {"type": "integer"}, "Where it begins in the inflated data set."),
    parameter("length", {"type": "integer"}, "Its bytes."),
)


def offered(archive: Archive) -> list[Operation]:
    """Bulk data of an instance."""

    def bulkdata(request: Request) -> Response:
        return answer(archive, request)

    types = (f'multipart/related; type="{OCTETS}"', OCTETS)
    what, path = "A value of an instance", INSTANCE + "/bulkdata"
    return [Operation("GET", path, bulkdata, what, "WADO-RS", types, _PARAMETERS, others=(206, 304), in_part=True)]


def answer(archive: Archive, request: Request) -> Response:
    """The value, or the part of it that a Range header names."""
    ranges = accepted(request)
    choose(ranges, (OCTETS,))
    single = next((one.type != "multipart/related" for one in ranges if one.quality), True)
    [instance] = archive.instances(request)[:1]
    offset, length, deflated = _place(request, instance)
    tag = etag([instance], offset, length, single)
    if known := not_modified(request, tag):
        return known
    headers = {"ETag": tag, "Accept-Ranges": "bytes"}
    status, start, end = 200, 0, length
    if single and (part := byte_range(request, tag, length)):
        start, end = part
        status = 206
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{length}"
    if deflated and not is_there(archive, instance, offset + end):
        raise WebError("there is no such value", http=404)
    parts = Parts(OCTETS)
    head, tail = (b"", b"") if single else (parts.head(), parts.end)
    headers["Content-Length"] = str(len(head) + end - start + len(tail))
    request.state.found = 1

    def body() -> Body:
        yield head
        if deflated:
            yield from inflated(archive, instance, offset + start, end - start)
        else:
            yield from archive.pieces(Range(instance.bundle, instance.offset + offset + start, end - start))
        yield tail

    return Streamed(body(), status, headers, OCTETS if single else parts.media_type)


def _place(request: Request, instance: StoredInstance) -> tuple[int, int, bool]:
    """(offset, length, whether in the inflated data set) that the URL names, inside the stored file."""
    given = dict(parse_qsl(request.url.query, keep_blank_values=True))
    deflated = "inflated_offset" in given
    offset, length = _number(given, "inflated_offset" if deflated else "offset"), _number(given, "length")
    if deflated:
        if syntax_of(instance) != DeflatedExplicitVRLittleEndian or offset + length > MAX_INFLATED:
            raise WebError("there is no such value", http=404)
    elif offset < instance.dataset_offset or offset + length > instance.length:
        raise WebError("there is no such value", http=404)
    return offset, length, deflated


def _number(given: dict[str, str], name: str) -> int:
    text = given.get(name, "")
    if not re.fullmatch(r"[0-9]{1,15}", text, re.ASCII):
        raise WebError(f"{name} must be a whole number")
    return int(text)
