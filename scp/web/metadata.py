"""WADO-RS metadata (PS3.18 10.4.1.1.2): the headers of the catalog as they are; no bundle is opened."""

from __future__ import annotations

from collections.abc import Iterator

import orjson
from starlette.requests import Request
from starlette.responses import Response

from sphere.catalog.service import StoredInstance
from sphere.scp.web.accept import accepted, choose
from sphere.scp.web.archive import Archive, etag, not_modified
from sphere.scp.web.multipart import Parts
from sphere.scp.web.native_xml import native_model
from sphere.scp.web.operations import PREFIX, Operation, service_root, uids
from sphere.scp.web.search import JSON, XML
from sphere.scp.web.streamed import Body, Streamed

PIECE = 1 << 18  # bytes of JSON handed on at once


def offered(archive: Archive) -> list[Operation]:
    """Metadata of a study, a series and an instance."""

    def metadata(request: Request) -> Response:
        return answer(archive, request)

    paths = {"study": "/studies/{study}", "series": "/studies/{study}/series/{series}"}
    paths["instance"] = paths["series"] + "/instances/{instance}"
    return [
        Operation(
            "GET",
            f"{PREFIX}{path}/metadata",
            metadata,
            f"The headers of a {name}",
            "WADO-RS",
            (JSON, XML),
            others=(304,),
            in_part=True,
        )
        for name, path in paths.items()
    ]


def answer(archive: Archive, request: Request) -> Response:
    """One object for each instance, bulk data as references to this service."""
    media_type = choose(accepted(request), (JSON, XML, "application/json"))
    archive = archive.of(request)
    instances = archive.instances(request)
    request.state.found = len(instances)
    base = service_root(request)
    tag = etag(instances, media_type, base)
    if known := not_modified(request, tag):
        return known
    named = uids(request)
    found = archive.catalog.lookup_headers(
        study=named["study"], series=named.get("series", ""), sop=named.get("instance", "")
    )
    objects = (with_references(header, base, one) for one, header in found)
    headers = {"ETag": tag}
    if media_type == XML:
        parts = Parts(XML)
        models = (native_model(orjson.loads(text)) for text in objects)
        return Streamed(parts.bodies(models), headers=headers, media_type=parts.media_type)
    return Streamed(_array(objects), headers=headers, media_type=media_type)


def instance_url(base: str, one: StoredInstance) -> str:
    """Of an instance, below the service."""
    return f"{base}/studies/{one.StudyInstanceUID}/series/{one.SeriesInstanceUID}/instances/{one.SOPInstanceUID}"


def with_references(header: str, base: str, one: StoredInstance) -> str:
    """A header whose places of bulk data are URIs; what looks like one inside a value is escaped there, and stays."""
    return header.replace('"BulkDataURI":"?', f'"BulkDataURI":"{instance_url(base, one)}/bulkdata?')


def _array(objects: Iterator[str]) -> Body:
    opening = "["
    for first in objects:
        piece, size = [opening, first], len(first)
        opening = ","
        for text in objects if size < PIECE else ():
            piece += (",", text)
            size += len(text)
            if size >= PIECE:
                break
        yield "".join(piece).encode()
    yield b"]" if opening == "," else b"[]"
