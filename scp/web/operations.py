"""What the service offers: one table that the routes and the OpenAPI document are made from."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from importlib.metadata import version
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sphere.catalog.grant import Grant
from sphere.conf.uids import UID
from sphere.scp.web.problem import MEDIA_TYPE, WebError

Endpoint = Callable[[Request], Response] | Callable[[Request], Awaitable[Response]]
Parameter = Mapping[str, Any]

PREFIX = "/dicom-web"
UID_SCHEMA = {"type": "string", "pattern": f"^{UID.pattern}$"}
PATH_SCHEMAS: Mapping[str, Any] = {
    "frames": {"type": "string"},
    "annotation": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
}
"""Of the path parameters that are no UIDs."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path; names in braces are its path parameters. `produces`: media types of its responses.

    `others`: statuses beside `status` of responses that are no problem bodies.

    `in_part`: its answer holds only what the caller may see (see `sphere.scp.web.archive.Archive.of`). Any other
    operation is refused to callers who may see a part of the archive only.
    """

    method: str
    path: str
    endpoint: Endpoint
    summary: str
    tag: str
    produces: Sequence[str] = ("application/json",)
    parameters: Sequence[Parameter] = field(default_factory=tuple)
    consumes: Sequence[str] = ()
    status: int = 200
    others: Sequence[int] = ()
    in_part: bool = False


def routes(operations: Iterable[Operation]) -> list[Route]:
    """Routes of the operations: long paths first, as frames are asked for most; of one length those without `{`."""
    ordered = sorted(operations, key=lambda one: (-one.path.count("/"), "{" in one.path))
    endpoints = [one.endpoint if one.in_part else _whole(one.endpoint) for one in ordered]
    return [Route(one.path, end, methods=[one.method]) for one, end in zip(ordered, endpoints, strict=True)]


def grant_of(request: Request) -> Grant | None:
    """What the caller may see; None for everything."""
    grant: Grant | None = getattr(request.state, "grant", None)
    return grant


def _whole(endpoint: Endpoint) -> Endpoint:
    """An endpoint for callers who may see everything."""

    @functools.wraps(endpoint)
    def guarded(request: Request) -> Any:
        if grant_of(request) is not None:
            raise WebError("this is not offered to the role researcher", http=403)
        return endpoint(request)

    @functools.wraps(endpoint)
    async def awaited(request: Request) -> Any:
        return await guarded(request)

    return awaited if inspect.iscoroutinefunction(endpoint) else guarded


def uids(request: Request) -> dict[str, str]:
    """The UIDs in the path by the names of its parameters; raises WebError where one is none."""
    found = {name: str(value) for name, value in request.path_params.items() if name != "frames"}
    for name, uid in found.items():
        if not UID.fullmatch(uid):
            raise WebError(f"{name} in the path is not a UID (PS3.5 9.1)")
    return found


def service_root(request: Request) -> str:
    """The URL of the DICOMweb service, as the client calls it."""
    return f"{root_of(request)}{PREFIX}"


def root_of(request: Request) -> str:
    """The URL of this server without the last slash: web.public_url, else as the client calls it.

    A Host header that names our own address without our port (dicomweb-client sends such) gets the port.
    """
    if public := str(request.app.state.public_url):
        return public
    url, server = request.base_url, request.scope.get("server")
    if server and url.port is None and url.hostname == server[0]:
        url = url.replace(port=server[1])
    return str(url).rstrip("/")


def parameter(name: str, schema: Mapping[str, Any], text: str) -> Parameter:
    """A query parameter that may be left out."""
    return {"name": name, "in": "query", "required": False, "schema": schema, "description": text}


def openapi(operations: Iterable[Operation]) -> Operation:
    """/openapi.json, of the given operations and itself."""
    document: dict[str, Any] = {}

    def answer(request: Request) -> Response:
        return JSONResponse(document)

    itself = Operation("GET", "/openapi.json", answer, "This document", "service", in_part=True)
    document |= described((*operations, itself))
    return itself


def described(operations: Iterable[Operation]) -> dict[str, Any]:
    """The OpenAPI document of some operations."""
    paths: dict[str, dict[str, Any]] = {}
    for one in operations:
        paths.setdefault(one.path, {})[one.method.lower()] = _described(one)
    info = {"title": "SPHERE", "summary": "DICOMweb (PS3.18) of a research PACS", "version": version("sphere-pacs")}
    return {"openapi": "3.1.0", "info": info, "paths": paths}


def _other(status: int, content: Mapping[str, Any]) -> dict[str, Any]:
    without = status in (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED)
    return {"description": HTTPStatus(status).phrase, "content": {} if without else content}


def _described(one: Operation) -> dict[str, Any]:
    names = re.findall(r"{(\w+)}", one.path)
    schema = {name: PATH_SCHEMAS.get(name, UID_SCHEMA) for name in names}
    in_path = [{"name": name, "in": "path", "required": True, "schema": schema[name]} for name in names]
    content: dict[str, Any] = {media_type: {} for media_type in one.produces}
    described: dict[str, Any] = {
        "tags": [one.tag],
        "summary": one.summary,
        "parameters": [*in_path, *one.parameters],
        "responses": {
            str(one.status): {"description": "Success", "content": content},
            **{str(other): _other(other, content) for other in one.others},
            "4XX": {"description": "The request cannot be answered", "content": {MEDIA_TYPE: {}}},
            "5XX": {"description": "The service cannot answer now", "content": {MEDIA_TYPE: {}}},
        },
    }
    if one.consumes:
        described["requestBody"] = {"required": True, "content": {media_type: {} for media_type in one.consumes}}
    return described
