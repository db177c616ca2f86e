"""The capabilities of the service (PS3.18 8.9) as WADL or as OpenAPI, from the one table of operations."""

from __future__ import annotations

import re
from collections.abc import Iterable
from xml.sax.saxutils import quoteattr

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sphere.scp.web.accept import accepted, choose
from sphere.scp.web.operations import PREFIX, Operation, described, root_of

WADL, JSON = "application/vnd.sun.wadl+xml", "application/json"


def offered(operations: Iterable[Operation]) -> list[Operation]:
    """OPTIONS on the root of the service, and the same to be read with GET."""
    known = tuple(operations)

    def capabilities(request: Request) -> Response:
        if choose(accepted(request), (WADL, JSON, "application/xml")) == JSON:
            return JSONResponse(described(known))
        return Response(wadl(known, f"{root_of(request)}/"), media_type=WADL)

    what = "What the service can do (WADL or OpenAPI)"
    return [
        Operation("OPTIONS", PREFIX, capabilities, what, "service", (WADL, JSON), in_part=True),
        Operation("OPTIONS", f"{PREFIX}/", capabilities, what, "service", (WADL, JSON), in_part=True),
        Operation("GET", f"{PREFIX}/capabilities", capabilities, what, "service", (WADL, JSON), in_part=True),
    ]


def wadl(operations: Iterable[Operation], base: str) -> bytes:
    """The operations in the Web Application Description Language."""
    paths: dict[str, list[Operation]] = {}
    for one in operations:
        paths.setdefault(one.path.lstrip("/"), []).append(one)
    resources = "".join(_resource(path, methods) for path, methods in paths.items())
    text = (
        '<?xml version="1.0" encoding="UTF-8"?><application xmlns="http://wadl.dev.java.net/2009/02">'
        f"<resources base={quoteattr(base)}>{resources}</resources></application>"
    )
    return text.encode()


def _resource(path: str, methods: Iterable[Operation]) -> str:
    names = "".join(f'<param name="{name}" style="template" required="true"/>' for name in re.findall(r"{(\w+)}", path))
    return f"<resource path={quoteattr(path)}>{names}{''.join(map(_method, methods))}</resource>"


def _method(one: Operation) -> str:
    asked = "".join(f'<param name={quoteattr(str(p["name"]))} style="query"/>' for p in one.parameters)
    sent = "".join(f"<representation mediaType={quoteattr(kind)}/>" for kind in one.consumes)
    given = "".join(f"<representation mediaType={quoteattr(kind)}/>" for kind in one.produces)
    identity = quoteattr(re.sub(r"\W+", "-", f"{one.method} {one.path}").strip("-"))
    given = f'<response status="{one.status}">{given}</response>'
    return f'<method name="{one.method}" id={identity}><request>{asked}{sent}</request>{given}</method>'
