"""WADO-URI (PS3.18 clause 9): one instance by query parameters, as a file or as an image."""

from __future__ import annotations

import re
from collections.abc import Mapping

from starlette.requests import Request
from starlette.responses import Response

from sphere.catalog.service import StoredInstance
from sphere.conf.uids import UID
from sphere.scp.retrieve.outbound import syntax_of
from sphere.scp.web.accept import accepted, choose, parse
from sphere.scp.web.archive import Archive, etag, not_modified
from sphere.scp.web.operations import Operation, parameter
from sphere.scp.web.pixels import PixelReader
from sphere.scp.web.problem import WebError
from sphere.scp.web.render import Look, parse_look
from sphere.scp.web.rendered import image
from sphere.scp.web.retrieve import DICOM, single_instance

_IMAGES = ("image/jpeg", "image/png", "image/gif")
_KNOWN = {
    "requestType", "studyUID", "seriesUID", "objectUID", "contentType", "charset", "anonymize", "annotation", "rows",
    "columns", "region", "windowCenter", "windowWidth", "frameNumber", "imageQuality", "presentationUID",
    "presentationSeriesUID", "transferSyntax",
}  # fmt: skip
_PARAMETERS = tuple(parameter(name, {"type": "string"}, "See PS3.18 9.4.1.2.") for name in sorted(_KNOWN))


def offered(archive: Archive, reader: PixelReader) -> list[Operation]:
    """The one resource of the URI service."""

    def wado(request: Request) -> Response:
        return answer(archive, reader, request)

    types = (DICOM, *_IMAGES)
    what = "Retrieve an instance (WADO-URI)"
    return [Operation("GET", "/wado", wado, what, "WADO-URI", types, _PARAMETERS, others=(304,), in_part=True)]


def answer(archive: Archive, reader: PixelReader, request: Request) -> Response:
    """The instance as `contentType` says, by default as an image where it is one (PS3.18 9.1.2.2)."""
    given = _given(request)
    instances = archive.of(request).located(given["studyUID"], given["seriesUID"], given["objectUID"])
    request.state.found = 1
    instance = instances[0]
    ranges = parse(given["contentType"]) if given.get("contentType") else accepted(request)
    offer = (*_IMAGES, DICOM) if instance.pixel_offset is not None else (DICOM,)
    media_type = choose(ranges, offer)
    if media_type == DICOM:
        return _file(archive, request, instance, given.get("transferSyntax", ""))
    look, frame = _look(given), _whole(given, "frameNumber", 1)
    pixels = reader.find(instance)
    if not 1 <= frame <= pixels.frames:
        raise WebError(f"there are frames 1 to {pixels.frames}", http=404)
    tag = etag([instance], media_type, look, frame)
    if known := not_modified(request, tag):
        return known
    return Response(image(reader, pixels, [frame], media_type, look), 200, {"ETag": tag}, media_type)


def _given(request: Request) -> dict[str, str]:
    pairs = request.query_params.multi_items()
    given = dict(pairs)
    if len(given) < len(pairs):
        raise WebError("a parameter stands twice")
    if strange := sorted(given.keys() - _KNOWN):
        raise WebError(f"unknown parameter {strange[0][:100]!r}")
    if given.get("requestType") != "WADO":
        raise WebError("requestType must be WADO")
    for name in ("studyUID", "seriesUID", "objectUID"):
        if not UID.fullmatch(given.get(name, "")):
            raise WebError(f"{name} must be a UID (PS3.5 9.1)")
    for name in ("anonymize", "presentationUID"):
        if given.get(name):
            raise WebError(f"{name} is not supported", http=406)
    return given


def _file(archive: Archive, request: Request, instance: StoredInstance, syntax: str) -> Response:
    """As it lies where no transfer syntax is named: a viewer of this service reads what it finds."""
    return single_instance(archive, request, instance, syntax or syntax_of(instance))


def _look(given: Mapping[str, str]) -> Look:
    """The rendering parameters in the words of the RESTful service."""
    named = {"annotation": given.get("annotation", ""), "quality": given.get("imageQuality", "90")}
    if "windowCenter" in given or "windowWidth" in given:
        named["window"] = f"{given.get('windowCenter', '')},{given.get('windowWidth', '')},linear"
    rows, columns = _whole(given, "rows", 0), _whole(given, "columns", 0)
    if rows or columns:
        named["viewport"] = f"{columns or 8192},{rows or 8192}"
    if given.get("region"):
        raise WebError("region is not supported: ask for /rendered?viewport=", http=406)
    return parse_look(named)


def _whole(given: Mapping[str, str], name: str, default: int) -> int:
    text = given.get(name, str(default))
    if not re.fullmatch(r"[0-9]{1,6}", text, re.ASCII):
        raise WebError(f"{name} must be a whole number")
    return int(text)
